"""Answers of a server's worker on one device and on a mesh of four, printed as JSON; run by test_serving_mesh."""

import json
import queue
import sys

from served import toy_expert, toy_worker

from sva.adaptation.label_scoring import Hard
from sva.generation.load import load
from sva.generation.row_sampling import row_settings
from sva.parallel import sharding
from sva.parallel.mesh_config import parse
from sva.serving import experts_api
from sva.serving.tickets import Ended, Failed, Piece, Question, Ticket
from sva.serving.worker import WorkerConfig

ASKED = (
    {},
    {"weights": {"red": 0.5}},
    {"settings": row_settings(0.8, top_k=4, top_p=0.9), "seed": 3, "samples": 3},
    {"settings": row_settings(bias=((5, 9.0),)), "is_rich": True, "likeliest": 2, "scores_prompt": True},
    {"question": Question("what colour", Hard())},
    {"weights": {"late": 1.0}},
)


def answers(lm):
    """The tokens of every sample of every ticket, or why there are none."""
    worker, _ = toy_worker(lm, WorkerConfig(rows=4))
    worker.start()
    worker.call(lambda: experts_api.load(worker, "late", toy_expert(lm, 9))).result()
    found = []
    for settings in ASKED:
        events: queue.Queue = queue.Queue()
        ticket = Ticket(tell=events.put, **{"prompt_ids": [3, 5, 7, 4], "max_new_tokens": 8, **settings})
        worker.submit(ticket)
        tokens: list = [[] for _ in range(ticket.samples)]
        ended = 0
        while ended < ticket.samples:
            event = events.get(timeout=300)
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Piece):
                tokens[event.sample] += event.tokens
            ended += isinstance(event, Ended)
        found.append(tokens)
    worker.end()
    return found


if __name__ == "__main__":
    alone = answers(load(sys.argv[1], progress=False))
    with sharding.on_mesh(parse("data=2,tensor=2")) as mesh:
        together = answers(load(sys.argv[1], mesh=mesh, progress=False))
    print(json.dumps([alone, together]))
