"""One table: a method's name -> how a base becomes a model to train, and how a trained one is dialled.

Knows nothing about data, training loops or scores.
"""

from ..baselines import adapter_rehearsal, corda_model, ewc, l2_sp, lwf, oft_model, osf_model, reader_rehearsal, replay
from ..errors import RecipeError, UsageError, unknown_name
from ..rehearsal import gate_rehearsal
from .building import (
    generator_reads,
    load_plain,
    load_reading,
    load_remembering,
    load_woven,
    memory_reads,
    own,
    plain,
    reading,
    remembering,
    slim,
    woven,
    woven_slim,
)
from .dials import guard_strength, retention, scale, yielding
from .method import Dial, Knob, Method, SavedAdapter

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("peft", "plain PEFT", "The adapter alone, as PEFT trains it.", plain, load_plain),
        Method(
            "peft_scaled",
            "plain PEFT × λ",
            "The trained adapter scaled by λ afterwards (WiSE-FT); swept, nothing is trained again.",
            load=load_plain,
            dial=Dial("peft", scale),
            knob=Knob("scale", (0.25, 0.5, 0.75)),
        ),
        Method("peft_rate", "plain PEFT, other learning rates", "The adapter alone, at multiples of its learning rate.",
               plain, load_plain, knob=Knob("rate", (0.1, 0.3), "learning_rate")),
        Method("peft_steps", "plain PEFT, fewer steps", "The adapter alone, with a share of the steps.",
               plain, load_plain, knob=Knob("steps", (0.1, 0.3), "steps")),
        Method("peft_rehearsal", "plain PEFT + rehearsal", "The adapter alone, with the same rehearsal and no gate.",
               plain, load_plain, knob=Knob("rehearsal_weight", (1.0, 4.0)), term=adapter_rehearsal,
               rehearses="always"),
        Method("peft_replay", "plain PEFT + replay", "The adapter alone, trained on general text beside the task.",
               plain, load_plain, knob=Knob("replay_weight", (0.3, 1.0)), term=replay, rehearses="always"),
        Method("peft_lwf", "plain PEFT + KL to the base (LwF)",
               "The adapter alone, kept near the base's predictions on the task's own data.",
               plain, load_plain, knob=Knob("lwf_weight", (0.01, 0.03, 0.1)), term=lwf),
        Method("peft_l2", "plain PEFT + L2-SP", "The adapter alone, with a penalty on how far it moves the weights.",
               plain, load_plain, knob=Knob("l2_weight", (10.0, 100.0, 1000.0)), term=l2_sp),
        Method("peft_ewc", "plain PEFT + EWC",
               "The adapter alone, with a penalty on moving the weights that the base needs for general text.",
               plain, load_plain, knob=Knob("ewc_weight", (10.0, 100.0, 1000.0)), term=ewc, rehearses="always"),
        Method("peft_osf", "OSF", "PEFT's OSF: only the smallest singular directions of the weights are trained.",
               own(osf_model), load_plain, knob=Knob("osf_rate", (1.0, 3.0), "learning_rate")),
        Method("peft_oft", "OFT", "PEFT's OFT: the inputs of the layers are rotated, in blocks.",
               own(oft_model), load_plain, knob=Knob("oft_rate", (0.03, 0.1, 0.3), "learning_rate")),
        Method("peft_corda", "CorDA (knowledge-preserved)",
               "LoRA that starts in the directions of the weights that general text uses least.",
               own(corda_model), load_plain, knob=Knob("corda_rate", (0.1, 0.3, 1.0), "learning_rate"),
               rehearses="always"),
        Method("imsm", "IMSM", "Both memories, fused by the query-aware gate, with the recipe's rehearsal and guard.",
               woven("query_gate"), load_woven, term=gate_rehearsal, rehearses="if on",
               guarded=True),
        Method("imsm_published", "IMSM as published", "IMSM without rehearsal and guard, as in its paper.",
               woven("query_gate"), load_woven),
        Method("imsm_published_rate", "IMSM as published, gate rates",
               "IMSM as published, at multiples of its gate's learning rate.",
               woven("query_gate"), load_woven, knob=Knob("gate_rate", (2.0, 6.0), "gate_learning_rate")),
        Method("imsm_gate", "IMSM, gate without query", "Both memories, fused by a gate that does not see the query.",
               woven("gate"), load_woven),
        Method("imsm_average", "IMSM, 1:1 average", "Both memories in equal shares, without a gate.",
               woven("average"), load_woven),
        Method("imsm_guard_alone", "plain PEFT + domain guard",
               "The adapter alone within the training data's domain, the base beyond: the guard without the gate.",
               woven("enhanced"), load_woven, guarded=True),
        Method(
            "imsm_retention",
            "IMSM, retention dial",
            "The trained IMSM model, its gate shifted towards the original memory; swept, nothing is trained again.",
            load=load_woven,
            dial=Dial("imsm", retention),
            knob=Knob("retention", (1.0, 2.0, 3.0)),
        ),
        Method(
            "imsm_guard",
            "IMSM, guard dial",
            "The trained IMSM model with its domain guard at other strengths, 0 being off; nothing is trained again.",
            load=load_woven,
            dial=Dial("imsm", guard_strength),
            knob=Knob("guard", (0.0, 5.0)),
            guarded=True,
        ),
        Method(
            "imsm_published_retention",
            "IMSM as published, retention dial",
            "IMSM as published, its gate shifted towards the original memory; swept, nothing is trained again.",
            load=load_woven,
            dial=Dial("imsm_published", retention),
            knob=Knob("retention", (1.0, 2.0, 3.0)),
        ),
        Method("slim", "SLIM", "LoRA experts beside identity experts, chosen token by token, of the adapter's rank.",
               slim(), load_plain),
        Method(
            "slim_yielding",
            "SLIM, yielding dial",
            "The trained SLIM, its yielding to identity multiplied; swept, nothing is trained again.",
            load=load_plain,
            dial=Dial("slim", yielding),
            knob=Knob("yielding", (0.0, 4.0, 16.0)),
        ),
        Method("slim_rate", "SLIM, other learning rates", "SLIM, at multiples of its learning rate.",
               slim(), load_plain, knob=Knob("slim_rate", (0.3, 3.0), "learning_rate")),
        Method("slim_published", "SLIM, distance as published", "SLIM whose distance is the maximum over channels.",
               slim(distance="max"), load_plain),
        # its ablation: each has one part more than the one before, and SLIM has masks beside the last one's parts
        Method("slim_mixture", "mixture of LoRA experts", "A plain mixture: no identity experts, no merging, no L1.",
               slim(num_identity_experts=0, masking_ratio=0.0, l1_weight=0.0), load_plain),
        Method("slim_identity", "mixture + identity experts", "LoRA experts and identity experts alone.",
               slim(yielding_strength=0.0, masking_ratio=0.0, l1_weight=0.0), load_plain),
        Method("slim_unmerged", "mixture + identity + yielding", "SLIM without merging: neither masks nor the L1 term.",
               slim(masking_ratio=0.0, l1_weight=0.0), load_plain),
        Method("slim_unmasked", "mixture + identity + yielding + L1", "SLIM without masks.",
               slim(masking_ratio=0.0), load_plain),
        Method("slim_rehearsal", "SLIM + rehearsal", "SLIM with the same rehearsal as IMSM, and no gate.",
               slim(), load_plain, knob=Knob("slim_rehearsal_weight", (1.0,)), term=adapter_rehearsal,
               rehearses="always"),
        Method("imsm_slim", "IMSM over SLIM", "IMSM whose enhanced memory is SLIM, with the recipe's rehearsal.",
               woven_slim, load_woven, term=gate_rehearsal, rehearses="if on", guarded=True),
        Method("generative_adapter", "GenerativeAdapter",
               "A generator that turns what it reads into an adapter, with the recipe's rehearsal; its questions come "
               "without the text.",
               reading, load_reading, term=reader_rehearsal, rehearses="if on", reads=generator_reads),
        Method("cmt", "CMT", "A compressor of documents, and a base that answers from those it has compressed.",
               remembering(), load_remembering, reads=memory_reads),
        # two parts of its ablation; the third, answering from all documents and not the nearest, needs no training
        Method("cmt_plain_loss", "CMT without memory-aware loss", "CMT trained by cross-entropy with memory alone.",
               remembering(memory_aware_weight=0.0), load_remembering, reads=memory_reads),
        Method("cmt_unmatched", "CMT without self-matching", "CMT less the loss that matches questions and memories.",
               remembering(self_matching_weight=0.0), load_remembering, reads=memory_reads),
    )
}  # fmt: skip


def get_method(name: str) -> Method:
    """The method of that name. Raises UsageError, with the nearest name, for one that does not exist."""
    if name not in METHODS:
        raise UsageError(unknown_name("method", name, METHODS))
    return METHODS[name]


def check_saved(method: Method, adapter: SavedAdapter) -> None:
    """Raise RecipeError for a method that a saved adapter leaves nothing to do. `peft` is then the adapter as it is."""
    if not adapter.train and method.name == "imsm_average":
        raise RecipeError("peft.train: imsm_average has no gate, so nothing is left to train. Leave it out.")
    if method.build in (None, reading) or (method.load is load_woven and method.build is not woven_slim):
        return
    if method.build is not plain:
        raise RecipeError(f"peft.path: {method.name} has an adapter of its own and cannot go on from a saved one.")
    if not adapter.train and method.name != "peft":
        raise RecipeError(f"peft.train: {method.name} trains the adapter, and it is to be left as it is.")


def knobs() -> dict[str, Knob]:
    """Every knob by its name."""
    return {method.knob.name: method.knob for method in METHODS.values() if method.knob}


def label_of(name: str, peft_type: str) -> str:
    """What a report calls the method, with the adapter's own name in place of "plain PEFT"."""
    kinds = {"lora": "LoRA", "adalora": "AdaLoRA", "ia3": "(IA)³", "oft": "OFT", "loha": "LoHa", "lokr": "LoKr"}
    return get_method(name).label.replace("plain PEFT", kinds.get(peft_type, peft_type))
