import json

import pytest
from pydantic import ValidationError

from twinweave.errors import DataError, UsageError
from twinweave.evaluation import KNOWN_TASKS, METRICS, Task, resolve_task
from twinweave.evaluation.rows import choice_index, read_choices, read_examples, read_pairs, read_texts


@pytest.fixture
def write(tmp_path):
    def make(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def test_the_table():
    assert set(KNOWN_TASKS) == {
        *("gsm8k", "cola", "mrpc", "ropes", "webq", "freebaseqa", "multirc"),
        *("wikitext", "minimal_pairs", "completion_loss"),
    }
    for name, task in KNOWN_TASKS.items():
        assert task.name == name
        assert task.description
        assert task.higher_is_better == METRICS[task.metric].higher_is_better == (task.unit == "fraction")
        assert resolve_task(name) == task
        assert resolve_task(name) is not task


def test_overrides_of_a_known_task():
    task = resolve_task({"task": "gsm8k", "name": "maths", "data": "x.jsonl", "limit": 5})
    assert (task.name, task.data, task.limit) == ("maths", "x.jsonl", 5)
    assert task.metrics == ["number_match"]
    assert KNOWN_TASKS["gsm8k"].data != "x.jsonl"
    loss = resolve_task({"task": "cola", "kind": "completion_loss"})
    assert (loss.metric, loss.higher_is_better, loss.unit) == ("loss", False, "nats")


def test_a_users_own_file(tmp_path):
    path = tmp_path / "capitals.yaml"
    path.write_text(
        "name: capitals\nkind: generation\ndata: capitals.jsonl\nprompt: 'The capital of {country} is'\n"
        "completion: '{capital}'\nmetrics: [exact_match, token_f1]\nmax_new_tokens: 8\nstop: [\"\\n\"]\n"
    )
    task = resolve_task(str(path))
    assert (task.metric, task.stop, task.max_new_tokens) == ("exact_match", ["\n"], 8)
    assert resolve_task({"task": str(path), "limit": 3}).limit == 3
    assert resolve_task(task) is task


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm9k", "Unknown task 'gsm9k'. Did you mean 'gsm8k'"),
        ("nowhere.yaml", "does not exist: looked for /"),
        ({"task": "colla"}, "Did you mean 'cola'"),
        ({"task": "gsm8k", "max_new_token": 3}, "'max_new_token'. Did you mean 'max_new_tokens'"),
        ({"name": "x", "kind": "generations"}, "Task 'x': kind: .*'generation'.*given: 'generations'"),
        ({"name": "x", "kind": "generation", "metrics": ["exact"]}, "Unknown metric 'exact'. Did you mean 'exact_"),
        ({"name": "x", "kind": "generation", "metrics": ["loss"]}, "'loss' does not fit a generation task"),
        ({"name": "x", "kind": "multiple_choice"}, "needs both `choices` and `answer`"),
        ({"name": "x", "kind": "generation", "choices": ["no", "yes"]}, "`choices` needs `answer`"),
        ({"name": "x", "kind": "generation", "stop": [""]}, "empty text"),
        ({"name": "x", "kind": "text_loss", "limit": 0}, "limit"),
        ({"kind": "text_loss"}, "name"),
        (7, "not 7"),
    ],
)
def test_bad_tasks(spec, message):
    with pytest.raises(UsageError, match=message):
        resolve_task(spec)


@pytest.mark.parametrize("content", ["- a\n- b\n", "", "a: [", "name: x\nkind: text_loss\nlimits: 3\n"])
def test_bad_task_files(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UsageError):
        resolve_task(str(path))


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError):
        Task(name="x", kind="text_loss", colour="red")


def test_no_data_names_the_fix():
    with pytest.raises(UsageError, match=r"'minimal_pairs' has no data of its own\. Add `data: FILE`"):
        read_pairs(resolve_task("minimal_pairs"))


def test_published_columns_and_ready_prompts(write):
    published = write("a.jsonl", {"sentence": "He go.", "label": 0, "idx": 0})
    example = read_examples(resolve_task({"task": "cola", "data": published}))[0]
    assert "Sentence: He go.\n" in example.prompt
    assert example.references == ("no",)
    ready = write("b.jsonl", {"prompt": "Is it? He go.", "completion": "no"})
    example = read_examples(resolve_task({"task": "cola", "data": ready}))[0]
    assert (example.prompt, example.completion) == ("Is it? He go.", "no")
    nested = {"background": "B", "situation": "S", "question": "Q?", "answers": {"text": ["x", "y"]}}
    example = read_examples(resolve_task({"task": "ropes", "data": write("c.jsonl", nested)}))[0]
    assert example.references == ("x", "y")
    aliases = write("d.jsonl", {"prompt": "Q", "completion": ["x", "y"]})
    assert read_examples(resolve_task({"task": "webq", "data": aliases}))[0].references == ("x", "y")


def test_a_users_template_must_fit(write):
    path = write("a.jsonl", {"prompt": "p", "completion": "c"})
    task = resolve_task({"task": "gsm8k", "data": path, "prompt": "{qestion}"})
    with pytest.raises(DataError, match="qestion"):
        read_examples(task)


def test_choices(write):
    rows = [
        {"question": "1+1?", "options": ["1", "2"], "answer": "2"},
        {"question": "2+2?", "options": ["four", "five"], "answer": "A"},
        {"question": "3+3?", "options": ["five", "six"], "answer": 1},
    ]
    fields = {"name": "sums", "kind": "multiple_choice", "choices": "options", "answer": "answer"}
    task = resolve_task({**fields, "data": write("a.jsonl", rows[0])})
    assert [(row.prompt, row.answer) for row in read_choices(task)] == [("1+1?", 1)]
    task = resolve_task({**fields, "data": write("b.jsonl", rows[1]), "prompt": "Q: {question}"})
    assert [(row.prompt, row.answer) for row in read_choices(task)] == [("Q: 2+2?", 0)]
    task = resolve_task({**fields, "data": write("c.jsonl", rows[2]), "choices": ["x", "y", "z"]})
    assert read_choices(task)[0].choices == ("x", "y", "z")
    task = resolve_task({**fields, "data": write("d.jsonl", {"question": "?", "options": ["a"], "answer": 0})})
    with pytest.raises(DataError, match="row 1 has the choices"):
        read_choices(task)


def test_choice_index():
    assert choice_index("B", ["B", "A"], "row 1") == 0
    assert choice_index("b", ["x", "y"], "row 1") == 1
    assert choice_index("1", ["x", "y"], "row 1") == 1
    for bad in ("C", 2, "-1", None, "", "both"):
        with pytest.raises(DataError, match="row 1 has the answer"):
            choice_index(bad, ["x", "y"], "row 1")


def test_pairs_and_texts(write):
    path = write("a.jsonl", {"sentence_good": "He goes.", "sentence_bad": "He go."})
    assert read_pairs(resolve_task({"task": "minimal_pairs", "data": path}))[0].bad == "He go."
    with pytest.raises(DataError, match="two filled ones: good and bad"):
        read_pairs(resolve_task({"task": "minimal_pairs", "data": write("b.jsonl", {"good": "x"})}))
    path = write("c.jsonl", {"text": " \n"}, {"text": "hello"})
    assert [text for _, text in read_texts(resolve_task({"task": "wikitext", "data": path}))] == ["hello"]
    with pytest.raises(DataError, match=r"every text .* is blank"):
        read_texts(resolve_task({"task": "wikitext", "data": write("d.jsonl", {"text": ""})}))


def test_several_sources_share_the_limit(write, tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write(name, *({"text": f"{name} {index}"} for index in range(4)))
    task = resolve_task({"task": "wikitext", "data": str(tmp_path / "*.jsonl"), "limit": 4})
    texts = [text for _, text in read_texts(task)]
    assert texts == ["a.jsonl 0", "a.jsonl 1", "b.jsonl 0", "c.jsonl 0"]
    listed = [str(tmp_path / "c.jsonl"), str(tmp_path / "a.jsonl")]
    texts = read_texts(resolve_task({"task": "wikitext", "data": listed, "limit": 1}))
    assert [text for _, text in texts] == ["c.jsonl 0"]
    assert texts[0][0].endswith("c.jsonl row 1")
    with pytest.raises(DataError, match="No file matches"):
        read_texts(resolve_task({"task": "wikitext", "data": str(tmp_path / "*.csv")}))
