import pytest

from twinweave.data import to_example
from twinweave.errors import DataError

WHERE = "file.jsonl row 17"


@pytest.mark.parametrize("names", [("prompt", "completion"), ("input", "output"), ("question", "answer")])
def test_accepted_columns(names):
    example = to_example({names[0]: "q", names[1]: "a", "other": 1}, where=WHERE)
    assert (example.prompt, example.completion, example.references) == ("q", "a", ("a",))


def test_first_complete_pair_wins():
    row = {"prompt": "p", "completion": None, "question": "q", "answer": "a"}
    assert to_example(row, where=WHERE).prompt == "q"


def test_templates_over_columns():
    row = {"question": "Who?", "place": "Rome", "answer": "{her}"}
    example = to_example(row, where=WHERE, prompt_template="{place}: {question}\nAnswer:")
    assert (example.prompt, example.completion) == ("Rome: Who?\nAnswer:", "{her}")
    example = to_example(row, where=WHERE, completion_template="It is {place}.")
    assert (example.prompt, example.completion) == ("Who?", "It is Rome.")


def test_aliases_train_the_first():
    row = {"question": "q", "answers": {"text": ["Paris", "paree"]}, "completion": ["x", "y"], "prompt": "p"}
    assert to_example(row, where=WHERE).references == ("x", "y")
    example = to_example(row, where=WHERE, prompt_template="{question}", completion_template="{answers[text]}")
    assert (example.completion, example.references) == ("Paris", ("Paris", "paree"))


def test_numbers_become_text():
    assert to_example({"question": "6 x 7", "answer": 42}, where=WHERE).completion == "42"


def test_messages():
    turns = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    example = to_example({"messages": turns}, where=WHERE)
    assert example.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    assert example.references == ("hello",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no prompt and no completion. Its columns are: text. Accepted"),
        ({"prompt": "x"}, "has no completion"),
        ({"completion": "x"}, "has no prompt"),
        ({"prompt": "x", "completion": None}, "has no completion"),
        ({"prompt": " \n", "completion": "x"}, "empty prompt"),
        ({"prompt": "x", "completion": ""}, "empty completion"),
        ({"prompt": "x", "completion": " \n"}, "empty completion"),
        ({"prompt": "x", "completion": []}, "empty completion"),
        ({"prompt": "x", "completion": ["a", ""]}, "empty completion"),
        ({"prompt": "x", "completion": {"a": 1}}, "not text"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": "hi"}, "not a list of turns"),
        ({"messages": ["hi"]}, "turn 1 is not an object with a role"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "starts with an assistant"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}, "turn 2"),
    ],
)
def test_bad_rows_name_the_row(row, message):
    with pytest.raises(DataError, match=message) as caught:
        to_example(row, where=WHERE)
    assert WHERE in str(caught.value)


@pytest.mark.parametrize("template", ["{nowhere}", "{", "{}", "{0}", "{prompt.x}", "{prompt!z}", "{empty}"])
def test_bad_templates_name_the_template_and_the_columns(template):
    row = {"prompt": "p", "completion": "c", "empty": None}
    with pytest.raises(DataError, match="completion, prompt") as caught:
        to_example(row, where=WHERE, prompt_template=template)
    assert repr(template) in str(caught.value)
