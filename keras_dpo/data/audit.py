"""Audits of a dataset: its statistics and its defects."""

import dataclasses
from itertools import groupby
from operator import itemgetter

import numpy as np

from keras_dpo.data.dataset import PreferenceDataset

COLORS = {"prompt": "\033[2m", "scored": "\033[32m", "control": "\033[35m"}
RESET = "\033[0m"


@dataclasses.dataclass
class Audit:
    """Statistics of a dataset as it will be trained on.

    Args:
        lines: Lines of the report.
        numbers: Statistics by name.
        prompt_histogram: (upper bound, pairs) of prompt lengths, in tokens.
        completion_histogram: (upper bound, completions) of their lengths.
    """

    lines: list[str]
    numbers: dict[str, float]
    prompt_histogram: list[tuple[int, int]]
    completion_histogram: list[tuple[int, int]]


def audit(
    dataset: PreferenceDataset, validation: PreferenceDataset | None = None
) -> Audit:
    """Audit a dataset, and its overlap with a validation set."""
    pairs = dataset.pairs
    prompts, chosen, rejected = pairs.lengths.T
    seen = np.unique(pairs.prompt_keys)
    numbers: dict[str, float] = {
        "pairs": len(pairs),
        "duplicate_prompts": len(pairs) - len(seen),
        "empty_answers": dataset.report.counts.get("empty answers", 0),
        "chosen_longer_share": float(np.mean(chosen > rejected)),
        "mean_prompt_tokens": float(prompts.mean()),
        "mean_chosen_tokens": float(chosen.mean()),
        "mean_rejected_tokens": float(rejected.mean()),
        "score_inversions": int((pairs.extra("margin") < 0).sum()),
        "padding_waste": padding_waste(dataset),
        "buckets": len(dataset.shapes),
    }
    if validation is not None:
        numbers["prompts_shared_with_validation"] = pairs.shared_prompts(
            validation.pairs
        )
    lines = [*dataset.report.lines(), *_sentences(numbers, dataset)]
    return Audit(
        lines,
        numbers,
        _histogram(prompts),
        _histogram(np.concatenate([chosen, rejected])),
    )


def _sentences(
    numbers: dict[str, float], dataset: PreferenceDataset
) -> list[str]:
    shapes = ", ".join(f"{length} ({t})" for length, t in dataset.shapes)
    lines = [
        f"Pairs: {numbers['pairs']:.0f}; mean tokens: prompt "
        f"{numbers['mean_prompt_tokens']:.0f}, chosen "
        f"{numbers['mean_chosen_tokens']:.0f}, rejected "
        f"{numbers['mean_rejected_tokens']:.0f}",
        f"Chosen longer than rejected: {numbers['chosen_longer_share']:.0%}",
        f"Buckets, length (completion): {shapes}; padded to "
        f"{numbers['padding_waste']:.2f} x the real tokens",
    ]
    notes = {
        "duplicate_prompts": "pairs repeat another pair's prompt",
        "score_inversions": "pairs score the rejected answer higher",
        "prompts_shared_with_validation": "prompts are in the validation set",
    }
    for name, meaning in notes.items():
        if numbers.get(name):
            lines.append(f"Note: {numbers[name]:.0f} {meaning}")
    return lines


def padding_waste(dataset: PreferenceDataset) -> float:
    """Ratio of tokens in an epoch's padded rows to real tokens."""
    prompts, chosen, rejected = dataset.pairs.lengths.T
    real = (2 * prompts + chosen + rejected).sum()
    buckets = dataset.buckets_of(np.arange(dataset.num_pairs))
    padded = sum(
        2 * dataset.batch_size * dataset.shapes[buckets[batch].max()][0]
        for batch in dataset.all_batches()
    )
    return float(padded / real)


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    bounds = [16 * 2**i for i in range(12)]
    # Lengths over the last bound are counted there.
    places = np.searchsorted(bounds[:-1], lengths)
    return list(zip(bounds, np.bincount(places).tolist(), strict=False))


def render_pair(dataset: PreferenceDataset, index: int) -> str:
    """Render a pair as the model sees it: prompt dim, scored tokens green,
    control tokens magenta."""
    pair, tokenizer = dataset.pairs[index], dataset.preprocessor.tokenizer
    control = set(tokenizer.control_tokens.values()) if tokenizer else set()

    def show(ids: list[int], scored: list[bool]) -> str:
        kinds = [
            "control" if token in control else "scored" if flag else "prompt"
            for token, flag in zip(ids, scored, strict=True)
        ]
        text = ""
        for kind, run in groupby(zip(kinds, ids, strict=True), itemgetter(0)):
            tokens = [token for _, token in run]
            if tokenizer is None:
                shown = " ".join(map(str, tokens))
            else:
                shown = tokenizer.decode(tokens, False)
            text += COLORS[kind] + shown + RESET
        return text

    def flags(ids: list[int], scored: list[bool] | None) -> list[bool]:
        return [True] * len(ids) if scored is None else scored

    chosen = show(pair.chosen_ids, flags(pair.chosen_ids, pair.chosen_scored))
    rejected = show(
        pair.rejected_ids, flags(pair.rejected_ids, pair.rejected_scored)
    )
    prompt = show(pair.prompt_ids, [False] * len(pair.prompt_ids))
    return f"{prompt}\nchosen: {chosen}\nrejected: {rejected}"
