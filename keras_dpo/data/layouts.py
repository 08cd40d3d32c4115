"""The layouts that preference data comes in, one small function each.

`LAYOUTS` is searched in order; the first that fits the first row is used for
all rows. `settle` derives a `Form` from it: which columns are read, and whether
the rows are chats or plain text. Both depend on the columns, never on a row's
cells, so an empty cell changes no row's format.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras_dpo.data.values import (
    SYSTEM_ROLES,
    Message,
    Record,
    Row,
    RowError,
    TieError,
    binary_choice,
    common_turns,
    finite_number,
    is_empty,
    is_messages,
    messages,
    starts_with,
    text,
    tools,
)
from keras_dpo.errors import UserError

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "history")
SYSTEM_COLUMNS = ("system", "system_prompt")
ASSISTANT_MARK = "\n\nAssistant:"
# Layouts with two answers and a label: answers, label, label -> signed
# preference, positive if the first answer is better.
AB_LAYOUTS = (
    (
        "response1",
        "response2",
        "overall_preference",
        lambda x, field: -finite_number(x, field),
    ),
    (
        "response_1",
        "response_2",
        "preference_strength",
        lambda x, field: -finite_number(x, field),
    ),
    (
        "human_ref_A",
        "human_ref_B",
        "labels",
        lambda x, field: 2 * binary_choice(x, field) - 1,
    ),
    (
        "response_0",
        "response_1",
        "better_response_id",
        lambda x, field: 1 - 2 * binary_choice(x, field),
    ),
)
SCORE_NAMES = ("overall_score", "score", "rating")


class Layout(NamedTuple):
    """One way to write preference pairs.

    Args:
        name: Name in the report.
        fits: Whether a row has this layout.
        convert: A row and the dataset's form -> records.
        columns: Columns that it always reads, if present.
        parts: Further parts it reads: `prompt` (one of `PROMPT_COLUMNS` with
            `input` and `history`), `system`.
        is_chat: Whether its rows are always messages.
    """

    name: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row, "Form"], list[Record]]
    columns: tuple[str, ...]
    parts: tuple[str, ...] = ("system",)
    is_chat: bool = False


class Form(NamedTuple):
    """How all rows of a dataset are read; settled by the first row's columns.

    Args:
        layout: The layout.
        is_chat: Whether records are messages, for the chat template.
        columns: Every column that is read.
        prompt: The column of the prompt's text.
        system: The column of the system text, if there is one.
        context: Whether `context` holds the prompt as messages.
        labels: The entry of `AB_LAYOUTS`, if there is a label.
        every: Whether a ranked list gives all its pairs.
    """

    layout: Layout
    is_chat: bool
    columns: frozenset[str]
    prompt: str
    system: str | None
    context: bool
    labels: tuple[Any, ...] | None
    every: bool = False


def settle(row: Row, every: bool = False) -> Form:
    """The form of a dataset that begins with this row.

    Args:
        row: The first row.
        every: Whether a ranked list gives all its pairs.

    Raises:
        ValueError: No layout fits; the message lists the row's columns.
    """
    layout = detect(row)
    read = set(layout.columns)
    prompt, system, context, labels = "prompt", None, False, None
    is_chat = layout.is_chat
    if "system" in layout.parts:
        system = next((name for name in SYSTEM_COLUMNS if name in row), None)
    if layout.convert is from_ab:
        labels = next(x for x in AB_LAYOUTS if _has_ab(row, x))
        read |= {*labels[:3], "score_ratio"}
        no_prompt = not any(name in row for name in PROMPT_COLUMNS)
        context = "context" in row and (
            no_prompt or is_messages(row["context"])
        )
    if context:
        read.add("context")
    elif "prompt" in layout.parts:
        prompt = next((x for x in PROMPT_COLUMNS if x in row), prompt)
        prompt = "question" if layout.convert is from_ordered else prompt
        read.add(prompt)
        if prompt == "instruction":
            read.add("input")
        if prompt != "history":
            read.add("history")
            is_chat = is_chat or "history" in row
    if system:
        read.add(system)
    is_chat = is_chat or context or system is not None
    if is_chat:
        read.add("tools")
    columns = frozenset(read)
    return Form(
        layout, is_chat, columns, prompt, system, context, labels, every
    )


def columns_of(row: Row, form: Form) -> set[str]:
    """Names of the row's columns, and of those in an API row's input."""
    names = set(row)
    inner = row.get("input")
    if form.layout.convert is from_api and isinstance(inner, Mapping):
        names |= {f"input.{name}" for name in inner}
        names -= {"input.messages", "input.tools"}
    return names


def check_form(form: Form, first: Row, row: Row) -> None:
    """Raise if a later row has a column that the first row lacks and that
    would have settled another form."""
    new = {
        name: value
        for name, value in row.items()
        if name not in first and not is_empty(value)
    }
    if not new:
        return
    other = settle({**first, **new}, form.every)
    if other._replace(columns=form.columns) != form:
        names = ", ".join(map(repr, new))
        raise UserError(
            "every row must have the columns that say how rows are laid out. "
            f"Received: {names}, which row 0 lacks. Give row 0 the same "
            'columns, such as "system": "" where it has none.'
        )


# --- Prompts and answers ----------------------------------------------------


def asked(row: Row, form: Form) -> str | list[Message]:
    """The prompt: a string, or messages if the dataset is a chat."""
    if form.context:
        return with_system(row, form, messages(row.get("context"), "context"))
    if is_messages(row.get("context")) and form.labels is not None:
        raise RowError("context", "as in row 0, no messages", row["context"])
    prompt = text(row, form.prompt)
    if form.prompt == "instruction" and not is_empty(row.get("input")):
        prompt = f"{prompt}\n{text(row, 'input')}"
    if not form.is_chat:
        return prompt
    past = past_turns(row) if form.prompt != "history" else []
    turns = [*past, {"role": "user", "content": prompt}]
    return with_system(row, form, turns)


def past_turns(row: Row) -> list[Message]:
    """Messages of `history`, a list of [user, assistant]."""
    turns = row.get("history")
    if is_empty(turns):
        return []
    if not isinstance(turns, list):
        raise RowError("history", "a list of [user, assistant]", turns)
    past = []
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("history", "a list of [user, assistant]", turn)
        for role, content in zip(("user", "assistant"), turn, strict=True):
            if not isinstance(content, str):
                raise RowError("history", "made of strings", content)
            past.append({"role": role, "content": content})
    return past


def with_system(row: Row, form: Form, turns: list[Message]) -> list[Message]:
    """Prepend the row's system text to a conversation."""
    if form.system is None or is_empty(row.get(form.system)):
        return turns
    system = text(row, form.system)
    if turns[0]["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"].strip() != system.strip():
        raise RowError(
            form.system,
            "the text of the system message that the messages begin with, or "
            "empty",
            system,
        )
    return turns


def pair(
    row: Row, form: Form, prompt: Any, chosen: Any, rejected: Any
) -> Record:
    """Make a record; in a chat, answers that are strings become turns."""
    answers = [
        [{"role": "assistant", "content": answer}]
        if form.is_chat and isinstance(answer, str)
        else answer
        for answer in (chosen, rejected)
    ]
    record = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    schemas = tools(row.get("tools"), "tools") if form.is_chat else []
    return {**record, "tools": schemas} if schemas else record


# --- Layouts --------------------------------------------------------------


def from_ids(row: Row, form: Form) -> list[Record]:
    """Token ids, passed through unchanged."""
    record = {}
    for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids: Any = row.get(field)
        good = isinstance(ids, list) and set(map(type, ids)) == {int}
        if not good or min(ids) < 0 or max(ids) >= 2**31:
            wanted = "a non-empty list of token ids >= 0 and < 2**31"
            raise RowError(field, wanted, ids)
        record[field] = ids
    return [record]


def from_sharegpt(row: Row, form: Form) -> list[Record]:
    """`conversations` and one chosen and rejected message."""
    prompt = messages(row.get("conversations"), "conversations")
    chosen = messages(row.get("chosen"), "chosen")
    rejected = messages(row.get("rejected"), "rejected")
    return [_conversation(row, form, prompt, chosen, rejected)]


def from_api(row: Row, form: Form) -> list[Record]:
    """OpenAI's preference rows."""
    source = row.get("input")
    if not isinstance(source, Mapping):
        raise RowError("input", "a mapping with messages", source)
    prompt = messages(source.get("messages"), "input.messages")
    fields = ("preferred_output", "non_preferred_output")
    chosen, rejected = (messages(row.get(field), field) for field in fields)
    if not is_empty(source.get("tools")):
        if not is_empty(row.get("tools")):
            raise RowError("tools", "given once, not in `input` too", "both")
        row = {**row, "tools": source["tools"]}
    return [_conversation(row, form, prompt, chosen, rejected, fields)]


def from_messages(row: Row, form: Form) -> list[Record]:
    """Message lists, with the prompt in them, beside them or both."""
    chosen = messages(row.get("chosen"), "chosen")
    rejected = messages(row.get("rejected"), "rejected")
    given = row.get("prompt")
    if isinstance(given, list):
        prompt = messages(given, "prompt")
        size = len(prompt)
        repeat = [
            len(turns) > size and starts_with(turns, prompt)
            for turns in (chosen, rejected)
        ]
        if all(repeat):
            chosen, rejected = chosen[size:], rejected[size:]
        elif any(repeat):
            field = "rejected" if repeat[0] else "chosen"
            raise RowError(
                field, "with the turns of `prompt`, as its partner", row[field]
            )
    elif not is_empty(given) and chosen[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": text(row, "prompt")}]
    else:
        # The prompt is the common leading turns; a prompt string beside full
        # message lists only repeats the last user turn.
        size = common_turns(chosen, rejected)
        prompt = chosen[:size]
        chosen, rejected = chosen[size:], rejected[size:]
        if not prompt:
            wanted = "messages that start like `rejected`"
            raise RowError("chosen", wanted, chosen)
    return [_conversation(row, form, prompt, chosen, rejected)]


def repeats_its_prompt(row: Row, record: Record) -> bool:
    """Whether a prompt beside whole conversations repeats a turn of theirs."""
    given = row.get("prompt")
    if (
        not isinstance(given, str)
        or not given
        or not is_messages(record["prompt"])
    ):
        return True
    said = [turn["content"].split() for turn in record["prompt"]]
    return given.split() in [*said, [word for part in said for word in part]]


def _conversation(
    row: Row,
    form: Form,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    fields: tuple[str, str] = ("chosen", "rejected"),
) -> Record:
    for field, turns in zip(fields, (chosen, rejected), strict=True):
        if not turns or turns[-1]["role"] != "assistant":
            raise RowError(field, "messages that end with the assistant", turns)
        if turns[0]["role"] != "assistant":
            raise RowError(
                field,
                "messages that begin with the prompt or the assistant",
                turns,
            )
    return pair(row, form, with_system(row, form, prompt), chosen, rejected)


def from_strings(row: Row, form: Form) -> list[Record]:
    """Strings with a prompt column, and perhaps a system text or history."""
    answers = (text(row, "chosen"), text(row, "rejected"))
    return [pair(row, form, asked(row, form), *answers)]


def from_transcript(row: Row, form: Form) -> list[Record]:
    """HH transcripts, split at the last assistant mark."""
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    for field in SYSTEM_COLUMNS:
        if not is_empty(row.get(field)):
            raise RowError(field, "empty beside transcripts", row[field])
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
    return [pair(row, form, prompt, answer, other)]


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


def from_ordered(row: Row, form: Form) -> list[Record]:
    """`response_j` is better than `response_k`."""
    answers = (text(row, "response_j"), text(row, "response_k"))
    return [pair(row, form, asked(row, form), *answers)]


def from_ab(row: Row, form: Form) -> list[Record]:
    """Two answers and a label or a signed strength."""
    first, second, field, sign = form.labels or AB_LAYOUTS[0]
    preference = sign(row.get(field), field)
    answers = [text(row, first), text(row, second)]
    if preference == 0:
        raise TieError
    if preference < 0:
        answers.reverse()
    record = pair(row, form, asked(row, form), *answers)
    margin = abs(preference)
    if not is_empty(row.get("score_ratio")):
        margin = finite_number(row["score_ratio"], "score_ratio")
    return [{**record, "margin": float(margin)}]


def _has_ab(row: Row, layout: tuple[Any, ...]) -> bool:
    return all(name in row for name in layout[:3])


def from_summaries(row: Row, form: Form) -> list[Record]:
    """Two summaries of a post and the choice, 0 or 1."""
    info, summaries = row.get("info"), row.get("summaries")
    good = (
        isinstance(info, Mapping)
        and isinstance(summaries, list)
        and len(summaries) == 2
        and all(isinstance(x, Mapping) for x in summaries)
    )
    if not isinstance(info, Mapping) or not good:
        raise RowError("summaries", "two mappings with a text", summaries)
    choice = binary_choice(row.get("choice"), "choice")
    body = info.get("post") or info.get("article")
    if not isinstance(body, str):
        raise RowError("info", "a mapping with a post or an article", info)
    title = f"Title: {info['title']}\n\n" if info.get("title") else ""
    texts = [text(summary, "text") for summary in summaries or ()]
    prompt: Any = f"{title}{body}\n\nTL;DR:"
    if form.is_chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = with_system(row, form, turns)
    return [pair(row, form, prompt, texts[choice], texts[1 - choice])]


def from_ranked(row: Row, form: Form) -> list[Record]:
    """A list of scored answers: the best against the worst, or all pairs."""
    completions = row.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise RowError("completions", "a list of two or more", completions)
    for completion in completions:
        if not isinstance(completion, Mapping):
            raise RowError("completions", "made of mappings", completion)
    # One name for all: scores under two names are not comparable.
    name = next((n for n in SCORE_NAMES if n in completions[0]), "score")
    scored = [
        (
            finite_number(item.get(name), f"completions.{name}"),
            text(item, "response"),
        )
        for item in completions
    ]
    scored.sort(key=lambda answer: -answer[0])
    pairs = [(scored[0], scored[-1])]
    if form.every:
        pairs = [(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    pairs = [(a, b) for a, b in pairs if a[0] != b[0]]
    if not pairs:
        raise TieError
    prompt = asked(row, form)
    return [
        {**pair(row, form, prompt, a[1], b[1]), "margin": a[0] - b[0]}
        for a, b in pairs
    ]


def _both(row: Row, test: Callable[[Any], bool]) -> bool:
    return test(row.get("chosen")) or test(row.get("rejected"))


LAYOUTS = (
    Layout(
        "token ids",
        lambda row: "chosen_ids" in row or "prompt_ids" in row,
        from_ids,
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        (),
    ),
    Layout(
        "ShareGPT conversations",
        lambda row: "conversations" in row and "chosen" in row,
        from_sharegpt,
        ("conversations", "chosen", "rejected"),
        is_chat=True,
    ),
    Layout(
        "API preference rows",
        lambda row: "input" in row and "preferred_output" in row,
        from_api,
        ("input", "preferred_output", "non_preferred_output"),
        is_chat=True,
    ),
    Layout(
        "message lists",
        lambda row: _both(row, is_messages),
        from_messages,
        ("prompt", "chosen", "rejected"),
        is_chat=True,
    ),
    Layout(
        "strings with a prompt",
        lambda row: (
            "chosen" in row
            and "rejected" in row
            and any(name in row for name in PROMPT_COLUMNS)
        ),
        from_strings,
        ("chosen", "rejected"),
        ("prompt", "system"),
    ),
    Layout(
        "transcripts",
        lambda row: "chosen" in row and "rejected" in row,
        from_transcript,
        ("chosen", "rejected", *SYSTEM_COLUMNS),
        (),
    ),
    Layout(
        "ordered answers",
        lambda row: {"question", "response_j", "response_k"} <= set(row),
        from_ordered,
        ("response_j", "response_k"),
        ("prompt", "system"),
    ),
    Layout(
        "two answers and a label",
        lambda row: any(_has_ab(row, layout) for layout in AB_LAYOUTS),
        from_ab,
        (),
        ("prompt", "system"),
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
        ("completions",),
        ("prompt", "system"),
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
