"""Interprets the output of a forward by the head in the name of the model's class: labels, words, an answer, a
transcript.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from transformers import PreTrainedModel

    from devmap_config.runner.inputs import ModelInputs

MOST_LABELS = 5
LONGEST_ANSWER_TOKENS = 64


class Output(NamedTuple):
    """The output of a model: as text for people, and as a JSON value."""

    text: str
    value: Any


def output_of(model: PreTrainedModel, forward: Any, inputs: ModelInputs) -> Output:
    """Return the interpreted output of a forward, or its shapes if the head is unknown."""
    name = type(model).__name__
    for suffix, read in HEADS.items():
        if name.endswith(suffix) and (read is _labels or inputs.tokenizer is not None):
            return read(model, forward, inputs)
    return _shapes(forward)


def _labels(model: PreTrainedModel, forward: Any, _inputs: ModelInputs) -> Output:
    """Return the labels with their probabilities, exclusive or independent ones, or the value, if it is a
    regression.
    """
    logits, config = forward.logits[0].float(), model.config
    if config.problem_type == "regression" or logits.numel() == 1:
        values = logits.tolist()
        return Output(" ".join(f"{value:.6f}" for value in values), values)
    is_each = config.problem_type == "multi_label_classification"
    return _ranked(logits.sigmoid() if is_each else logits.softmax(-1), lambda index: _label(model, index), "label")


def _ranked(scores: torch.Tensor, named: Callable[[int], str], key: str) -> Output:
    best = scores.topk(min(MOST_LABELS, scores.numel()))
    ranked = [
        {key: named(index), "score": score}
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return Output(_lines(ranked, key), ranked)


def _lines(labels: Iterable[Mapping[str, Any]], key: str) -> str:
    return "\n".join(f"{label['score']:.4f}  {label[key]}" for label in labels)


def _label(model: PreTrainedModel, index: int) -> str:
    return str((model.config.id2label or {}).get(index, f"LABEL_{index}"))


def _entities(model: PreTrainedModel, forward: Any, inputs: ModelInputs) -> Output:
    """Return the parts of the text with a label other than `O`; neighbours with the same label are joined."""
    scores = forward.logits[0].float().softmax(-1).max(-1)
    entities: list[dict[str, Any]] = []
    for index, (score, best) in enumerate(zip(scores.values.tolist(), scores.indices.tolist(), strict=True)):
        label, span = _label(model, best), inputs.encoding.token_to_chars(index)
        if label == "O" or span is None or span.start == span.end:
            continue
        begins, kind = label.startswith("B-"), label.removeprefix("B-").removeprefix("I-")
        last = entities[-1] if entities else None
        if last is not None and last["token"] == index - 1 and last["label"] == kind and not begins:
            last |= {"token": index, "end": span.end, "score": min(last["score"], score)}
        else:
            entities.append({"token": index, "label": kind, "start": span.start, "end": span.end, "score": score})
    for entity in entities:
        del entity["token"]
        entity["text"] = inputs.text[entity["start"] : entity["end"]]
    lines = [f"{entity['score']:.4f}  {entity['label']}  {entity['text']}" for entity in entities]
    return Output("\n".join(lines) or "no part of the text has a label", entities)


def _words(_model: PreTrainedModel, forward: Any, inputs: ModelInputs) -> Output:
    """Return the likeliest words for each mask, in order."""
    masks = (inputs.tensors["input_ids"][0] == inputs.tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    scores = forward.logits[0].float().softmax(-1)
    masks_filled = [
        _ranked(scores[mask], lambda index: inputs.tokenizer.decode([index]).strip(), "word") for mask in masks
    ]
    return Output("\n\n".join(words.text for words in masks_filled), [words.value for words in masks_filled])


def _answer(_model: PreTrainedModel, forward: Any, inputs: ModelInputs) -> Output:
    """Return the part of the second text that is likeliest to answer the first."""
    import torch

    of_texts = torch.tensor([part == 1 for part in inputs.encoding.sequence_ids(0)])
    starts, ends = (
        logits[0].float().cpu().masked_fill(~of_texts, -torch.inf).softmax(-1)
        for logits in (forward.start_logits, forward.end_logits)
    )
    spans = (starts[:, None] * ends[None, :]).triu().tril(LONGEST_ANSWER_TOKENS - 1)
    start, end = divmod(int(spans.argmax()), len(ends))
    text = inputs.tokenizer.decode(inputs.tensors["input_ids"][0, start : end + 1], skip_special_tokens=True).strip()
    score = spans[start, end].item()
    return Output(f"{score:.4f}  {text}", {"answer": text, "score": score})


def _transcript(_model: PreTrainedModel, forward: Any, inputs: ModelInputs) -> Output:
    """Return the text of a connectionist temporal classification, whose tokenizer merges repetitions."""
    text = str(inputs.tokenizer.decode(forward.logits[0].argmax(-1), skip_special_tokens=True))
    return Output(text, text)


HEADS: Mapping[str, Callable[[PreTrainedModel, Any, ModelInputs], Output]] = {
    "ForSequenceClassification": _labels,
    "ForImageClassification": _labels,
    "ForAudioClassification": _labels,
    "ForTokenClassification": _entities,
    "ForMaskedLM": _words,
    "ForQuestionAnswering": _answer,
    "ForCTC": _transcript,
}
"""By the ending of transformers' class names."""


def _shapes(forward: Any) -> Output:
    text = "\n".join(_described(forward))
    return Output(text, text)


def _described(forward: Any) -> Iterator[str]:
    import torch

    for name, value in forward.items():
        if isinstance(value, torch.Tensor):
            mean = value.float().mean().item()
            yield f"{name}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}, mean {mean:.6f}"
