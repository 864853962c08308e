"""Every script runs from end to end on a tiny shape and writes a result with all its keys."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import crossover, decode, few_rows, gpu, memory, prefill, report, training
from benchmarks.measure import Samples, interleaved, make_row, measure_all, parse, random_ids
from benchmarks.shapes import SHAPES, build_base
from benchmarks.systems import build

SHARED = ["--shape", "tiny", "--threads", "1", "--repeats", "2"]
DECODING = {"plain", "stacked", "two_pass", "auto", "guarded"}


def check(result: dict[str, Any], path: Path, kind: str, rows: int) -> None:
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert (result["schema"], result["kind"], result["complete"], len(result["rows"])) == (1, kind, True, rows)
    assert {"shape", "device", "dtype", "threads", "repeats", "seed"} <= result["settings"].keys()
    made = result["provenance"]
    assert made["command"].startswith(f"python -m benchmarks.{kind} --shape tiny")
    assert {"versions", "device", "date", "cores", "threads", "load_at_start", "git_commit"} <= made.keys()
    for row in result["rows"]:
        assert set(row) == {"case", "unit", "samples", "medians", "ratios"}
        assert all(value > 0 and math.isfinite(value) for value in row["medians"].values())


def test_decode(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    flags = ["--batch", "1", "2", "--context", "6", "--new-tokens", "3", "--published", "1", "--out", str(out)]
    result = decode.main([*SHARED, *flags])
    check(result, out, "decode", rows=4)
    per_token, whole = result["rows"][:2]
    assert per_token["case"] == {"adapters": "all", "batch": 1, "context": 6, "measure": "per_token"}
    assert set(per_token["samples"]) == DECODING
    assert all(len(values) == 2 for values in per_token["samples"].values())
    assert len(whole["samples"]["published"]) == 1
    assert set(whole["ratios"]) == {
        *(f"{plan}/plain" for plan in ("stacked", "two_pass", "auto")),
        "auto/two_pass",
        "published/auto",
        "guarded/auto",
    }
    assert "published" not in result["rows"][3]["samples"]  # it is of batch 1 only


def test_only_the_systems_that_were_asked_for_decode(tmp_path: Path) -> None:
    flags = ["--batch", "1", "--context", "6", "--new-tokens", "2", "--systems", "auto", "guarded"]
    result = decode.main([*SHARED, *flags, "--out", str(tmp_path / "decode.json")])
    assert all(set(row["samples"]) == {"auto", "guarded"} for row in result["rows"])
    assert all(set(row["ratios"]) == {"guarded/auto"} for row in result["rows"])


def test_the_guarded_system_has_a_guard_and_the_prompt_is_in_its_domain() -> None:
    systems = build("tiny", "cpu", "float32", 0, "all", guarded=True)
    assert systems.guard is not None
    assert systems.guard.centres.shape == (4, 64)  # as many directions as the tiny shape has channels
    prompt = random_ids(decode.parser().parse_args(["--shape", "tiny"]), 2, 32)
    logits = {}
    with torch.no_grad():
        for system in ("guarded", "auto"):
            model = systems.model(system)
            assert (model.guard is not None) == (system == "guarded")
            logits[system] = model(input_ids=prompt).logits[:, -1]
        assert torch.equal(logits["guarded"], logits["auto"])
        systems.guard.border[0] = 0.0  # nothing is within: the guard does act on what is measured
        assert not torch.equal(systems.model("guarded")(input_ids=prompt).logits[:, -1], logits["auto"])


def test_prefill(tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    result = prefill.main([*SHARED, "--context", "6", "--out", str(out)])
    check(result, out, "prefill", rows=4)
    cases = [(row["case"]["adapters"], row["case"]["measure"]) for row in result["rows"]]
    assert cases == [(a, m) for a in ("all", "upper") for m in ("prefill", "first_token")]


def test_crossover(tmp_path: Path) -> None:
    out = tmp_path / "crossover.json"
    result = crossover.main([*SHARED, "--rows", "1", "3", "--lengths", "5", "--new-tokens", "2", "--out", str(out)])
    check(result, out, "crossover", rows=3)
    assert [row["case"]["phase"] for row in result["rows"]] == ["decode", "decode", "prefill"]
    assert all(set(row["ratios"]) == {"stacked/two_pass"} for row in result["rows"])


def test_few_rows(tmp_path: Path) -> None:
    out = tmp_path / "few_rows.json"
    result = few_rows.main([*SHARED, "--rows", "1", "2", "--out", str(out)])
    check(result, out, "few_rows", rows=2)
    assert all(set(row["ratios"]) == {"w_xt/x_wt"} for row in result["rows"])


def test_training(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    result = training.main([*SHARED, "--batch", "2", "--length", "10", "--out", str(out)])
    check(result, out, "training", rows=1)
    assert set(result["rows"][0]["samples"]) == set(training.TRAINING)
    assert set(result["rows"][0]["ratios"]) == {f"{of}/{to}" for of, to in training.PAIRS}


def test_all_training_systems_do_the_work_they_are_named_after() -> None:
    systems = build("tiny", "cpu", "float32", 5, "all")
    args = training.parser().parse_args(["--shape", "tiny"])
    batch = training.batch_of(args, rows=2, length=10, labelled=0.5)
    assert batch["labels"].ne(-100).sum() == 10
    frozen = systems.imsm.frozen_states(**batch)
    gradients, losses = {}, {}
    for name in training.TASK_ALONE:
        loss = training.output_of(systems, name, batch, frozen if name == "imsm_frozen" else None).loss
        loss.backward()
        losses[name] = loss.item()
        model = systems.plain if name == "plain_full" else systems.imsm
        gradients[name] = [p.grad.clone() for n, p in model.named_parameters() if "lora_" in n]
        model.zero_grad()
    assert losses["plain_full"] == pytest.approx(losses["plain_labels"], rel=1e-5)
    assert losses["imsm"] == pytest.approx(losses["imsm_frozen"], rel=1e-5)
    assert losses["imsm"] != pytest.approx(losses["plain_full"], rel=1e-5)
    for one, other in (("plain_full", "plain_labels"), ("imsm", "imsm_frozen")):
        assert all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(gradients[one], gradients[other], strict=True)
        )


def test_a_rehearsing_step_is_the_step_with_rehearsal_of_the_share_of_rows() -> None:
    systems = build("tiny", "cpu", "float32", 5, "all")
    args = training.parser().parse_args(["--shape", "tiny"])
    batch = training.batch_of(args, rows=5, length=10, labelled=0.5)
    rehearsed: list[Any] = []
    forward = systems.imsm.get_base_model().forward

    def spy(*given: Any, **named: Any) -> Any:
        rehearsed.append(tuple(named["input_ids"].shape))
        return forward(*given, **named)

    gradients: dict[str, dict[str, torch.Tensor]] = {}
    systems.imsm.get_base_model().forward = spy
    try:
        for name in ("imsm", "imsm_frozen", *training.REHEARSING):
            step = training.training_step(args, systems, name, batch)
            rehearsed.clear()
            gradients[name] = gradients_of(systems.imsm, step)
            assert rehearsed == [(5, 10), *([(2, 128)] if "rehearsal" in name else [])]  # nothing frozen goes through
    finally:
        del systems.imsm.get_base_model().forward
    for name in training.REHEARSING:
        alone = gradients[name.partition("_rehearsal_")[0]]
        changed = {n for n, gradient in gradients[name].items() if not torch.allclose(gradient, alone[n], atol=1e-9)}
        assert any("lora_" in n for n in changed)  # through the task's gate, which is told where it belongs
        assert {"gate.w_a", "gate.w_b"} <= changed


def gradients_of(model: Any, step: Any) -> dict[str, torch.Tensor]:
    """What the optimizer of one step is given."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, n=n: found.__setitem__(n, p.grad.clone()))
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    step()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
def test_memory_of_decoding(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    flags = ["--work", "decode", "--context", "6", "--new-tokens", "2", "--systems", "plain", "published"]
    result = memory.main(["--shape", "25m", "--threads", "1", *flags, "--out", str(out)])
    assert result["complete"]
    peak, above_empty, above_loaded = (row["medians"] for row in result["rows"])
    weights = sum(p.numel() for p in build_meta("25m")) * 4
    assert set(peak) == {"plain", "published"}
    assert weights < above_empty["plain"] < 1.5 * weights < 1.9 * weights < above_empty["published"] < 2.5 * weights
    assert all(0 < above_loaded[name] < above_empty[name] < peak[name] for name in peak)


@pytest.mark.slow
def test_memory_of_training(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    flags = ["--work", "training", "--training-batch", "2", "--length", "64", "--systems", "plain_full", "plain_labels"]
    result = memory.main(["--shape", "25m", "--threads", "1", *flags, "--out", str(out)])
    above_loaded = next(row for row in result["rows"] if row["case"]["measure"] == "above_loaded")["medians"]
    logits = 128 * SHAPES["25m"].vocab_size * 4
    assert above_loaded["plain_full"] - above_loaded["plain_labels"] > logits / 2  # half of the tokens have no label


def build_meta(shape: str) -> list[torch.nn.Parameter]:
    return list(build_base(shape, "meta", "float32").parameters())


@pytest.mark.parametrize(
    ("shape", "millions"),
    [("25m", 26), ("200m", 207), ("1b", 1236), ("llama3-8b", 8030), ("qwen3-4b", 4022), ("qwen3-8b", 8191)],
)
def test_shapes_have_the_size_of_the_models_they_are_named_after(shape: str, millions: int) -> None:
    assert sum(p.numel() for p in build_meta(shape)) / 1e6 == pytest.approx(millions, rel=0.005)


def test_every_command_of_the_gpu_run_is_one_that_the_scripts_take(tmp_path: Path) -> None:
    scripts = {"decode": decode, "prefill": prefill, "training": training, "memory": memory, "crossover": crossover}
    outs = set()
    for shape in gpu.GPU_SHAPES:
        assert shape in SHAPES
        for name, *flags in gpu.commands(shape, "cuda", tmp_path):
            args = scripts[name].parser().parse_args(flags)  # type: ignore[attr-defined]
            assert (args.shape, args.device) == (shape, "cuda")
            outs.add(args.out)
    assert len(outs) == 18


def test_rounds_alternate_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleaved({name: lambda name=name: run(name) for name in "abc"}, 3, fewer={"c": 1})  # type: ignore[misc]
    assert "".join(order) == "ba" + "abc" + "ba" + "ab"  # the slow one needs no warm-up
    assert samples == {"a": [3.0, 7.0, 8.0], "b": [4.0, 6.0, 9.0], "c": [5.0]}


def test_a_case_that_does_not_fit_into_memory_stops_nothing(tmp_path: Path) -> None:
    args = parse(decode.parser(), [*SHARED, "--out", str(tmp_path / "out.json")])

    def measure(case: dict[str, Any]) -> dict[str, Samples]:
        if case["batch"] == 2:
            raise torch.OutOfMemoryError("too large\nand more")
        return {"per_token": {"plain": [1.0]}}

    result = measure_all(args, [{"batch": batch} for batch in (1, 2, 3)], measure, [])
    assert [row["case"]["batch"] for row in result["rows"]] == [1, 3]
    assert result["failed"] == [{"case": {"batch": 2}, "error": "too large"}]
    assert result["complete"]
    assert "Not measured: {'batch': 2} (too large)" in report.render(tmp_path)


def test_ratios_are_taken_within_a_round() -> None:
    row = make_row({}, "s", {"a": [2.0, 9.0, 40.0], "b": [1.0, 3.0, 10.0]}, [("a", "b"), ("c", "b")])
    assert row["medians"] == {"a": 9.0, "b": 3.0}
    assert row["ratios"]["a/b"] == {"median": 3.0, "low": 2.2, "high": 3.8, "samples": [2.0, 3.0, 4.0]}
    assert "c/b" not in row["ratios"]
