"""The layouts that preference data comes in, one small function each.

`LAYOUTS` is searched in order; the first whose test holds for the first row
is taken for all rows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras_dpo.errors import UserError

Row = Mapping[str, Any]
Record = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "history")
SYSTEM_COLUMNS = ("system", "system_prompt")
ASSISTANT_MARK = "\n\nAssistant:"
# Layouts with two answers and a label: answers, label, label -> signed
# preference, positive where the first answer is better.
AB_LAYOUTS = (
    ("response1", "response2", "overall_preference", lambda x: -x),
    ("response_1", "response_2", "preference_strength", lambda x: -x),
    ("human_ref_A", "human_ref_B", "labels", lambda x: 2 * x - 1),
    ("response_0", "response_1", "better_response_id", lambda x: 1 - 2 * x),
)


class RowError(UserError):
    """A row does not hold what its layout needs."""

    def __init__(self, field: str, needed: str, received: Any) -> None:
        shown = repr(received)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        super().__init__(
            f"field {field!r} must be {needed}. Received: {shown}."
        )


class TieError(UserError):
    """Neither answer of a row is better."""


class Layout(NamedTuple):
    """One way to write preference pairs.

    Args:
        name: For the report.
        fits: Whether a row is written this way.
        convert: A row, and whether to make all pairs of a ranked list, ->
            records.
        columns: The columns it may read.
    """

    name: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row, bool], list[Record]]
    columns: tuple[str, ...]


# --- Values -------------------------------------------------------------


def text(row: Row, field: str) -> str:
    """A string field, or an error that names it."""
    value = row.get(field)
    if not isinstance(value, str):
        raise RowError(field, "a string", value)
    return value


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, in either spelling."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, Mapping) for x in value)
        and ("role" in value[0] or "from" in value[0])
    )


def messages(value: Any, field: str) -> list[dict[str, str]]:
    """A message or list of messages as `{"role", "content"}` dicts."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise RowError(field, "a list of messages", value)
    normal = []
    for message in value:
        if not isinstance(message, Mapping):
            raise RowError(field, "a list of messages", message)
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = _joined_parts(content, field)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(
                field, "messages with a role and a text content", message
            )
        normal.append({"role": ROLES.get(role, role), "content": content})
    return normal


def _joined_parts(parts: list[Any], field: str) -> str:
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowError(field, "messages of text parts only", part)
    return "".join(str(part["text"]) for part in parts)


def chat(
    row: Row, prompt: str | list[dict[str, str]], answers: tuple[str, str]
) -> Record:
    """A record of messages, with the row's system text in front."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    for field in SYSTEM_COLUMNS:
        if row.get(field) and prompt[0]["role"] != "system":
            system = {"role": "system", "content": text(row, field)}
            prompt = [system, *prompt]
    chosen, rejected = (
        [{"role": "assistant", "content": answer}] for answer in answers
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def has_system(row: Row) -> bool:
    """Whether the row has a system text, so that messages must hold it."""
    return any(row.get(field) for field in SYSTEM_COLUMNS)


# --- Layouts --------------------------------------------------------------


def from_ids(row: Row, every: bool) -> list[Record]:
    """Token ids pass through untouched."""
    record = {}
    for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids: Any = row.get(field)
        good = isinstance(ids, list) and set(map(type, ids)) == {int}
        if not good or min(ids) < 0 or max(ids) >= 2**31:
            wanted = "a non-empty list of token ids >= 0 and < 2**31"
            raise RowError(field, wanted, ids)
        record[field] = ids
    return [record]


def from_sharegpt(row: Row, every: bool) -> list[Record]:
    """`conversations` and one chosen and rejected message."""
    prompt = messages(row["conversations"], "conversations")
    if has_system(row) and prompt[0]["role"] != "system":
        prompt = chat(row, prompt, ("", ""))["prompt"]
    return [
        {
            "prompt": prompt,
            "chosen": messages(row.get("chosen"), "chosen"),
            "rejected": messages(row.get("rejected"), "rejected"),
        }
    ]


def from_api(row: Row, every: bool) -> list[Record]:
    """OpenAI's preference rows."""
    source = row["input"]
    if not isinstance(source, Mapping):
        raise RowError("input", "a mapping with messages", source)
    return [
        {
            "prompt": messages(source.get("messages"), "input.messages"),
            "chosen": messages(row.get("preferred_output"), "preferred_output"),
            "rejected": messages(
                row.get("non_preferred_output"), "non_preferred_output"
            ),
        }
    ]


def from_messages(row: Row, every: bool) -> list[Record]:
    """Message lists, with the prompt in them, beside them or both."""
    chosen = messages(row.get("chosen"), "chosen")
    rejected = messages(row.get("rejected"), "rejected")
    given = row.get("prompt")
    if isinstance(given, list):
        prompt = messages(given, "prompt")
        size = len(prompt)
        if chosen[:size] == prompt and rejected[:size] == prompt:
            chosen, rejected = chosen[size:], rejected[size:]
    elif given and chosen[0]["role"] == "assistant":
        return [
            {
                "prompt": chat(row, text(row, "prompt"), ("", ""))["prompt"],
                "chosen": chosen,
                "rejected": rejected,
            }
        ]
    else:
        # The prompt is the common leading turns; a prompt string beside full
        # message lists only repeats the last user turn.
        size = common_turns(chosen, rejected)
        prompt = chosen[:size]
        chosen, rejected = chosen[size:], rejected[size:]
    if not prompt:
        raise RowError("chosen", "messages that start like `rejected`", chosen)
    for field, rest in (("chosen", chosen), ("rejected", rejected)):
        if not rest or rest[-1]["role"] != "assistant":
            raise RowError(field, "messages that end with the assistant", rest)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def common_turns(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> int:
    """Leading turns in common, up to the last user turn among them."""
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and (
        chosen[size] == rejected[size]
    ):
        size += 1
    # An identical assistant turn at the end is an answer, not a prompt.
    while size and chosen[size - 1]["role"] == "assistant":
        size -= 1
    return size


def from_strings(row: Row, every: bool) -> list[Record]:
    """Strings with a prompt column, and perhaps a system text or history."""
    answers = (text(row, "chosen"), text(row, "rejected"))
    field = next(name for name in PROMPT_COLUMNS if name in row)
    turns = row.get("history")
    prompt = "" if field == "history" else text(row, field)
    if field == "instruction" and row.get("input"):
        prompt = f"{prompt}\n{text(row, 'input')}"
    if isinstance(turns, list) and (turns or field != "history"):
        past = []
        for turn in turns:
            if not isinstance(turn, list) or len(turn) != 2:
                raise RowError("history", "a list of [user, assistant]", turn)
            for role, content in zip(("user", "assistant"), turn, strict=True):
                if not isinstance(content, str):
                    raise RowError("history", "made of strings", content)
                past.append({"role": role, "content": content})
        if past or has_system(row):
            user = {"role": "user", "content": prompt}
            return [chat(row, [*past, user], answers)]
    elif field == "history":
        prompt = text(row, "history")
    if has_system(row):
        return [chat(row, prompt, answers)]
    return [
        dict(
            zip(
                ("prompt", "chosen", "rejected"),
                (prompt, *answers),
                strict=True,
            )
        )
    ]


def from_transcript(row: Row, every: bool) -> list[Record]:
    """HH transcripts: the last assistant mark is the boundary."""
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    prompt, mark, answer = chosen.rpartition(ASSISTANT_MARK)
    other_prompt, other_mark, other = rejected.rpartition(ASSISTANT_MARK)
    if not (mark and other_mark):
        raise RowError(
            "chosen",
            "a transcript with '\\n\\nAssistant:', or come with a `prompt` "
            "column (use column_map to name it)",
            chosen if not mark else rejected,
        )
    if prompt != other_prompt:
        # Different histories share only their leading turns.
        prompt, answer, other = _split_at_common_turn(chosen, rejected)
    else:
        prompt += mark
    return [{"prompt": prompt, "chosen": answer, "rejected": other}]


def _split_at_common_turn(chosen: str, rejected: str) -> tuple[str, str, str]:
    ends = [
        i + len(ASSISTANT_MARK)
        for i in range(min(len(chosen), len(rejected)))
        if chosen.startswith(ASSISTANT_MARK, i)
        and chosen[: i + len(ASSISTANT_MARK)]
        == rejected[: i + len(ASSISTANT_MARK)]
    ]
    if not ends:
        raise RowError(
            "rejected", "a transcript that starts like `chosen`", rejected
        )
    return chosen[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :]


def from_ordered(row: Row, every: bool) -> list[Record]:
    """`response_j` is better than `response_k`."""
    return [
        {
            "prompt": text(row, "question"),
            "chosen": text(row, "response_j"),
            "rejected": text(row, "response_k"),
        }
    ]


def from_ab(row: Row, every: bool) -> list[Record]:
    """Two answers and a label or a signed strength."""
    first, second, field, sign = next(
        layout for layout in AB_LAYOUTS if _has_ab(row, layout)
    )
    label = row[field]
    if not isinstance(label, int | float):
        raise RowError(field, "a number", label)
    answers = (text(row, first), text(row, second))
    return [_labelled(row, answers, sign(label))]


def _has_ab(row: Row, layout: tuple[Any, ...]) -> bool:
    return all(name in row for name in layout[:3])


def _labelled(row: Row, answers: tuple[str, str], preference: float) -> Record:
    if preference == 0:
        raise TieError
    if preference < 0:
        answers = (answers[1], answers[0])
    if is_messages(row.get("context")):
        record = chat(row, messages(row["context"], "context"), answers)
    else:
        field = next((f for f in PROMPT_COLUMNS if f in row), "prompt")
        prompt = text(row, field)
        record = {
            "prompt": prompt,
            "chosen": answers[0],
            "rejected": answers[1],
        }
    margin = row.get("score_ratio", abs(preference))
    return {**record, "margin": float(margin)}


def from_summaries(row: Row, every: bool) -> list[Record]:
    """Two summaries of a post and the choice, 0 or 1."""
    info, summaries = row["info"], row["summaries"]
    good = (
        isinstance(info, Mapping)
        and isinstance(summaries, list)
        and len(summaries) == 2
        and all(isinstance(x, Mapping) for x in summaries)
    )
    if not good:
        raise RowError("summaries", "two mappings with a text", summaries)
    if row.get("choice") not in (0, 1):
        raise RowError("choice", "0 or 1", row.get("choice"))
    body = info.get("post") or info.get("article")
    if not isinstance(body, str):
        raise RowError("info", "a mapping with a post or an article", info)
    title = f"Title: {info['title']}\n\n" if info.get("title") else ""
    texts = [text(summary, "text") for summary in summaries]
    choice = row["choice"]
    return [
        {
            "prompt": f"{title}{body}\n\nTL;DR:",
            "chosen": texts[choice],
            "rejected": texts[1 - choice],
        }
    ]


def from_ranked(row: Row, every: bool) -> list[Record]:
    """A list of scored answers: the best against the worst, or all pairs."""
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise RowError("completions", "a list of two or more", completions)
    scored = []
    for completion in completions:
        if not isinstance(completion, Mapping):
            raise RowError("completions", "made of mappings", completion)
        names = ("overall_score", "score", "rating")
        score = next((completion[n] for n in names if n in completion), None)
        if not isinstance(score, int | float):
            raise RowError("completions", "scored with numbers", score)
        scored.append((float(score), text(completion, "response")))
    scored.sort(key=lambda pair: -pair[0])
    pairs = [(scored[0], scored[-1])]
    if every:
        pairs = [(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    pairs = [(a, b) for a, b in pairs if a[0] != b[0]]
    if not pairs:
        raise TieError
    field = next((f for f in PROMPT_COLUMNS if f in row), "prompt")
    prompt = text(row, field)
    return [
        {
            "prompt": prompt,
            "chosen": a[1],
            "rejected": b[1],
            "margin": a[0] - b[0],
        }
        for a, b in pairs
    ]


def _both(row: Row, test: Callable[[Any], bool]) -> bool:
    return test(row.get("chosen")) or test(row.get("rejected"))


STRING_COLUMNS = (
    *PROMPT_COLUMNS,
    *SYSTEM_COLUMNS,
    "input",
    "chosen",
    "rejected",
)
LAYOUTS = (
    Layout(
        "token ids",
        lambda row: "chosen_ids" in row or "prompt_ids" in row,
        from_ids,
        ("prompt_ids", "chosen_ids", "rejected_ids"),
    ),
    Layout(
        "ShareGPT conversations",
        lambda row: "conversations" in row and "chosen" in row,
        from_sharegpt,
        ("conversations", *STRING_COLUMNS),
    ),
    Layout(
        "API preference rows",
        lambda row: "input" in row and "preferred_output" in row,
        from_api,
        ("input", "preferred_output", "non_preferred_output"),
    ),
    Layout(
        "message lists",
        lambda row: _both(row, is_messages),
        from_messages,
        STRING_COLUMNS,
    ),
    Layout(
        "strings with a prompt",
        lambda row: (
            "chosen" in row
            and "rejected" in row
            and any(name in row for name in PROMPT_COLUMNS)
        ),
        from_strings,
        STRING_COLUMNS,
    ),
    Layout(
        "transcripts",
        lambda row: "chosen" in row and "rejected" in row,
        from_transcript,
        ("chosen", "rejected"),
    ),
    Layout(
        "ordered answers",
        lambda row: {"question", "response_j", "response_k"} <= set(row),
        from_ordered,
        ("question", "response_j", "response_k"),
    ),
    Layout(
        "two answers and a label",
        lambda row: any(_has_ab(row, layout) for layout in AB_LAYOUTS),
        from_ab,
        (
            *STRING_COLUMNS,
            "context",
            "score_ratio",
            *(name for layout in AB_LAYOUTS for name in layout[:3]),
        ),
    ),
    Layout(
        "two summaries and a choice",
        lambda row: {"info", "summaries", "choice"} <= set(row),
        from_summaries,
        ("info", "summaries", "choice"),
    ),
    Layout(
        "scored answers",
        lambda row: "completions" in row,
        from_ranked,
        (*STRING_COLUMNS, "completions"),
    ),
)


def detect(row: Row) -> Layout:
    """The layout of a row.

    Raises:
        ValueError: None fits; the message lists the row's columns.
    """
    for layout in LAYOUTS:
        if layout.fits(row):
            return layout
    wanted = [name for name in ("chosen", "rejected") if name not in row]
    missing = ", ".join(map(repr, wanted)) or "a usable 'chosen'"
    raise UserError(
        f"Row 0 is in no known layout: {missing} missing. Its columns: "
        f"{', '.join(map(repr, row)) or 'none'}. Name yours with column_map, "
        "such as {'prompt': 'question', 'chosen': 'good', 'rejected': 'bad'}."
    )
