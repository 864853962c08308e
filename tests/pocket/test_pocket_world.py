"""The pocket world, its language and its rows: no model needed."""

import random
from collections import Counter

import pytest

from twinweave.errors import UsageError
from twinweave.pocket import TASKS, corpus, language, names, retained_tasks, rows, skills, tasks, words
from twinweave.pocket.tokenizer import make_tokenizer
from twinweave.pocket.world import RELATIONS, make_world


def test_no_word_belongs_to_two_lists():
    lists = [value for value in vars(words).values() if isinstance(value, list)]
    counts = Counter(word for group in lists for word in group)
    assert [word for word, count in counts.items() if count > 1] == []


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    first = make_world.__wrapped__(0)
    again = make_world.__wrapped__(0)
    other = make_world.__wrapped__(1)
    assert (first.known, first.newcomers, first.towns) == (again.known, again.newcomers, again.towns)
    assert first.document_people == again.document_people
    assert first.known != other.known


def test_groups_of_people_do_not_meet_and_strangers_are_none_of_them():
    world = make_world()
    groups = [{p.name for p in group} for group in (world.known, world.newcomers, world.document_people)]
    assert [len(group) for group in groups] == [250, 40, 120]
    assert len(set.union(*groups)) == sum(map(len, groups))
    rng = random.Random(0)
    assert not {world.stranger(rng).name for _ in range(2000)} & set.union(*groups)


def test_documents_are_about_people_the_base_never_met():
    known = {person.name for person in make_world().known}
    people = {row["person"] for row in rows("documents")}
    assert len(people) >= 100
    assert not people & known
    everything = " ".join(row["prompt"] for name in names() if name.startswith("people_") for row in rows(name))
    assert not any(person in everything for person in people)


@pytest.mark.parametrize("seed", range(20))
def test_a_document_tells_every_fact_of_everybody_in_it(seed):
    rng, world = random.Random(seed), make_world()
    people = rng.sample(world.document_people, 3)
    text = language.document(people, rng)
    for person in people:
        assert person.name in text
        assert set(person.facts.values()) <= set(text.replace(".", "").split())


def test_document_questions_are_answered_by_their_document():
    texts = {row["id"]: row["text"] for row in rows("documents")}
    questions = rows("documents/questions")
    assert len(questions) == len(texts) * len(RELATIONS)
    for row in questions:
        assert row["completion"] in texts[row["document"]].replace(".", "").split()


@pytest.mark.parametrize("name", [name for name in names() if not name.startswith(("contexts", "memories"))])
def test_rows_are_what_any_jsonl_would_hold(name):
    found = rows(name)
    assert 80 <= len(found) <= 2000
    assert found == rows(name)
    columns = {"documents": {"id", "text", "person"}, "text": {"text"}}
    expected = columns.get(name, {"prompt", "completion"} | ({"document"} if "/questions" in name else set()))
    for row in found:
        assert set(row) == expected
        assert all(isinstance(value, str) and value.strip() == value != "" for value in row.values())


def test_changing_returned_rows_changes_nothing_for_the_next_caller():
    rows("copy/test")[0]["prompt"] = "spoiled"
    assert rows("copy/test")[0]["prompt"] != "spoiled"


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"'revers/train'.*'reverse/train'"):
        rows("revers/train")


@pytest.mark.parametrize("target", [task["name"] for task in TASKS if task["role"] == "target"])
def test_train_and_test_rows_share_no_prompt(target):
    train = {row["prompt"] for row in rows(f"{target}/train")}
    test = {row["prompt"] for row in rows(f"{target}/test")}
    assert len(train) == len(rows(f"{target}/train"))
    assert not train & test


def test_the_corpus_never_shows_test_rows_of_skills_or_reserved_people():
    world, rng = make_world(), random.Random(0)
    turns = [turn for _ in range(3000) for turn in corpus.sample_question(rng)]
    turns += [turn for _ in range(300) for turn in corpus.sample_text(rng, 3)]
    prompts = {prompt for prompt, _ in turns}
    for skill in skills.KNOWN_SKILLS:
        assert not prompts & {prompt for prompt, _ in tasks.held_out(skill)}
    text = " ".join(f"{prompt} {completion}" for prompt, completion in turns)
    assert not any(p.name in text for p in [*world.newcomers, *world.document_people])
    assert not {"Reverse", "Shift", "Sort"} & set(text.split())


def test_skills_have_the_right_answers():
    rng = random.Random(0)
    prompt, completion = skills.sort(rng)
    assert completion.split() == sorted(prompt.rstrip(".").split()[-4:])
    prompt, completion = skills.reverse(rng)
    assert completion.split() == prompt.rstrip(".").split()[-1:-4:-1]
    prompt, completion = skills.shift(rng)
    assert completion.split() == [chr(ord(letter) + 1) for letter in prompt.rstrip(".").split()[-3:]]
    assert dict(skills.all_sums())["What is 7 plus 5?"] == "12"
    assert dict(skills.all_letters())["Which letter is 2 before K?"] == "I"


def test_tokenizer_round_trips_every_text_without_unknown_words(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 1000
    texts = {
        text
        for name in names()
        for row in rows(name)[:2000]
        for column in row
        if column not in ("id", "document")
        for text in (row[column] if isinstance(row[column], list) else [row[column]])
    }
    for text in sorted(texts):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompt_and_completion_give_the_same_ids_apart_and_together():
    tokenizer = make_tokenizer()
    for row in rows("reverse/train")[:50] + rows("reading/test")[:20]:
        together = tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"]
        apart = tokenizer(row["prompt"])["input_ids"]
        for completion in (row["completion"], f" {row['completion']}"):
            assert together == apart + tokenizer(completion, add_special_tokens=False)["input_ids"]


def test_tasks_name_data_that_exists_and_families_depend_on_the_target():
    retained = [task for task in TASKS if task["role"] == "retained"]
    assert len(retained) >= 6
    assert {task["family"] for task in retained} == {"near", "far"}
    assert all(task["data"].removeprefix("pocket:") in names() for task in TASKS)
    for target in [task["name"] for task in TASKS if task["role"] == "target"]:
        near = {task["name"] for task in retained_tasks(target) if task["family"] == "near"}
        assert len(near) >= 2
        assert all("role" not in task for task in retained_tasks(target))
    assert {task["name"] for task in retained_tasks("newcomers") if task["family"] == "near"} >= {"people_town"}
    with pytest.raises(UsageError, match="'reverse'"):
        retained_tasks("revers")
