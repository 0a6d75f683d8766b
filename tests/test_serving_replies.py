"""The text and the numbers of a reply, without a server."""

import spoken

from sva.serving.asking import Asking, Prompt
from sva.serving.cost import Cost
from sva.serving.replies import Reply
from sva.serving.tickets import Ended, Mixed, Piece, Prompted, Ticket
from sva.serving.token_text import TokenText

MADE = spoken.byte_level()


def _tokens(text):
    """One a byte."""
    return [spoken.byte_id(MADE, byte) for byte in text.encode()]


def test_echoed_token_ids_are_their_text_and_offsets_point_into_it_streamed_or_not():
    prompt, answer = "a\N{SNOWMAN}b", "\N{SNOWMAN}c"
    ids = _tokens(prompt)
    ticket = Ticket(ids, print, max_new_tokens=4)
    reply = Reply(Asking([Prompt(ids, None, None)], [ticket], 0, True), "toy", "f", TokenText(MADE), is_chat=False)
    reply.add(0, Mixed({}))
    reply.add(0, Prompted([-1.0] * (len(ids) - 1), [[]] * (len(ids) - 1)))
    texts = ["", "", *answer]  # a character's text comes with its last byte
    events = [Piece(0, text, [token], [-1.0], []) for text, token in zip(texts, _tokens(answer), strict=True)]
    chunks = [reply.add(0, event)["choices"][0] for event in [*events, Ended(0, "length", Cost(0.0, 5, 4, 0.0))]]
    whole = reply.whole()["choices"][0]
    assert whole["text"] == "".join(chunk["text"] for chunk in chunks) == prompt + answer
    offsets = [place for chunk in chunks if chunk["logprobs"] for place in chunk["logprobs"]["text_offset"]]
    assert whole["logprobs"]["text_offset"] == offsets == [0, 1, 1, 1, 2, 3, 3, 3, 4]
    assert whole["logprobs"]["tokens"][:3] == ["a", "bytes:\\xe2", "bytes:\\x98"]
