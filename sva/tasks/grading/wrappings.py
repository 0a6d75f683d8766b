"""A model's answer without its thinking and without the tags that it puts around an answer.

Strict graders and their limits of length see `unwrapped(completion)`; the public code's verdicts are given on the raw
text. Tags count in either case, with blanks or underscores: <think>, <Thinking>, [THINK]; <answer>, <final_answer>.
"""

import re
from collections.abc import Sequence

_LONGEST = 250_000  # characters at the end of a completion that are looked at; 60,000 tokens of thinking
_TAG = re.compile(
    r"(?:<|\[(?=/?(?:think|answer|solution)\]))(?P<closes> ?/ ?| ?)"
    r"(?:(?P<thinking>think|thinking|thoughts?|reasoning|scratchpad)"
    r"|(?P<answer>(?:final[ _-]?)?answer|final)|(?P<whole>solution|response))(?: \w{1,20}=[^<>\n]{0,60})? ?[>\]]",
    re.IGNORECASE,
)
_CUT_TAG = re.compile(r"<[ /]{0,2}[A-Za-z_]{0,12}\Z")  # "</answ", where a stop string or the budget ended the text


def unwrapped(completion: str) -> str:
    """The answer of a completion: what its last answer tags hold, else what comes after its thinking.

    Thinking that was never closed has no answer after it, and "" is left; only a closed answer at the very end counts
    there. Where nothing follows the last thinking, what stands outside all of it is the answer. A closing tag without
    an opening one ends what a prompt began. Linear in the completion; a text without tags comes back as it is.
    """
    if len(completion) > _LONGEST:
        completion = completion.rstrip()  # so that blanks behind it do not push it out of the limit
        head = completion[:-_LONGEST].lower()
        is_thinking = head.rfind("<think") > head.rfind("</think")
        completion = ("<think>" if is_thinking else "") + completion[-_LONGEST:]
    tags = list(_TAG.finditer(completion))
    if not tags:
        return completion
    thoughts = [tag for tag in tags if tag["thinking"]]
    text = completion
    if thoughts:
        after, outside = _after(completion, thoughts), _outside(completion, thoughts)
        text = next((part for part in (after, outside) if _held(part) is not None), after if after.strip() else outside)
        if not text.strip():
            return _said_at_the_end(completion)
    held = _held(text)
    text = (text if held is None else held).rstrip()
    return text[text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1 :]  # the first line may be indented code


def _after(text: str, thoughts: Sequence[re.Match[str]]) -> str:
    """The text after the last closing tag, up to where thinking begins again."""
    closed = max((tag.end() for tag in thoughts if "/" in tag["closes"]), default=0)
    opened = min((tag.start() for tag in thoughts if tag.start() >= closed), default=len(text))
    return text[closed:opened]


def _outside(text: str, thoughts: Sequence[re.Match[str]]) -> str:
    """The text outside all thinking, which may be nested and may have begun in the prompt."""
    kept: list[str] = []
    depth = place = 0
    has_closed = False
    for tag in thoughts:
        if depth == 0:
            kept.append(text[place : tag.start()])
        if "/" not in tag["closes"]:
            depth += 1
        elif depth:
            depth -= 1
            has_closed = True
        elif not has_closed:
            kept, has_closed = [], True
        place = tag.end()
    return "".join(kept) + (text[place:] if depth == 0 else "")


def _held(text: str) -> str | None:
    """The text in the last answer tags that hold any, tags of a whole response after those; None without tags."""
    tags = list(_TAG.finditer(text))
    for kind in ("answer", "whole"):
        if (held := _last_held(text, [tag for tag in tags if tag[kind]])) is not None:
            return _held(held) if kind == "whole" and any(tag["answer"] for tag in _TAG.finditer(held)) else held
    return None


def _last_held(text: str, tags: Sequence[re.Match[str]]) -> str | None:
    closed: list[str] = []
    begun: list[str] = []
    for i, tag in enumerate(tags):
        if "/" in tag["closes"]:
            if i == 0:  # the prompt opened it
                closed.append(text[: tag.start()])
            continue
        following = tags[i + 1] if i + 1 < len(tags) else None
        held = text[tag.end() : following.start() if following else len(text)]
        if following is not None and "/" in following["closes"]:
            closed.append(held)
        elif tag[0].startswith("<"):  # "[answer]" alone is a gap to fill in
            begun.append(_CUT_TAG.sub("", held))
    found = [held for part in (closed, begun) for held in reversed(part) if held.strip()]
    return found[0] if found else "" if closed else None


def _said_at_the_end(completion: str) -> str:
    """The answer in tags that a text of nothing but thinking ends in, else ""."""
    tags = [tag for tag in _TAG.finditer(completion) if tag["answer"]]
    if len(tags) < 2 or "/" in tags[-2]["closes"] or "/" not in tags[-1]["closes"]:
        return ""
    return "" if completion[tags[-1].end() :].strip() else completion[tags[-2].end() : tags[-1].start()].strip()
