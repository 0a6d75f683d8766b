"""`sva generate`: prompts from arguments, a file or standard input to answers on the screen or in a file."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sva.cli.options import add_precision, precision
from sva.utils.errors import UserError
from sva.utils.jsonl import Prompt, read_prompts, resumed
from sva.utils.remote import local_argument, local_path, path_argument


def add(commands: Any, model: Mapping[str, Any]) -> None:
    """Adds the command; `model` is what every --model option shares."""
    text = "Answer prompts; with experts, in two passes."
    parser = commands.add_parser("generate", help=text, description=text)
    parser.set_defaults(run=_generate)
    parser.add_argument("prompts", nargs="*", help="questions, each one argument")
    parser.add_argument("--file", help='prompts from a file, one a line; of .jsonl the "prompt" of each; - is stdin')
    parser.add_argument(
        "--out", type=local_argument, help="write JSONL as answers are finished; started again, it goes on"
    )
    parser.add_argument("--json", action="store_true", help="print those lines instead of text")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are, without chat template")
    parser.add_argument("--model", **model)
    add_precision(parser)
    parser.add_argument(
        "--expert", type=path_argument, action="append", default=[], help="an expert file; may be repeated"
    )
    parser.add_argument(
        "--classifier", type=path_argument, help="a classification expert for the first pass (task: routing)"
    )
    parser.add_argument(
        "--alphas", type=path_argument, help="one mixture of the experts for all prompts, from sva adapt"
    )
    parser.add_argument("--skip-foreign", action="store_true", help="leave out experts of another base model")
    choices = "hard: the likeliest expert; soft: all by probability; a number: as hard, but the base where less sure"
    parser.add_argument("--choice", default="hard", help=f"{choices} (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 1 with a cut, otherwise 0)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    parser.add_argument("--min-p", type=float, help="draw from tokens this part as probable as the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], help="a text or special token that ends an answer; may be repeated"
    )
    parser.add_argument("--rows", type=int, default=32, help="answers at work at a time (default: %(default)s)")


def _generate(arguments: argparse.Namespace) -> None:
    from sva.adaptation.label_scoring import choice
    from sva.adaptation.mixture_file import Alphas
    from sva.generation import chat
    from sva.generation.load import load
    from sva.generation.sampling import strategy
    from sva.utils import seeds
    from sva.utils.errors import at_least

    if arguments.classifier and not arguments.expert:
        raise UserError("--classifier chooses between experts; name them with --expert")
    if arguments.choice != "hard" and not arguments.expert:
        raise UserError("--choice is between experts; name them with --expert")
    if arguments.alphas and (arguments.classifier or arguments.choice != "hard" or not arguments.expert):
        raise UserError("--alphas is one mixture for all prompts: name its experts with --expert, and no first pass")
    choice(arguments.choice)
    for name in ("samples", "max_new_tokens", "rows"):
        at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    seeds.check("--seed", arguments.seed)
    if "" in arguments.stop:
        raise UserError("--stop is empty; it would end every answer before it begins")
    sampling = strategy(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    prompts, faults = _prompts(arguments)
    lm = load(arguments.model, arguments.dtype, kv_dtype=arguments.kv_dtype)
    chat.end_tokens(lm, arguments.stop)  # a stop string that no text can hold is said before any work
    mixed = _mixed(lm, arguments) if arguments.alphas else lm
    lines = len(prompts) + len(faults)
    with contextlib.ExitStack() as stack:
        results = None
        if arguments.out:
            shared = ("max_new_tokens", "samples", "seed", "stop", "raw")
            settings = {name: getattr(arguments, name) for name in shared} | {"model": lm.fingerprint}
            settings |= {"sampling": repr(sampling), "experts": [str(path) for path in arguments.expert]}
            settings |= {"classifier": arguments.classifier and str(arguments.classifier)}
            settings |= {
                "choice": arguments.choice,
                "alphas": arguments.alphas and Alphas.load(arguments.alphas).values,
            }
            settings |= precision(arguments)
            results = stack.enter_context(resumed(arguments.out, settings))
        for record in _answers(mixed, prompts, faults, arguments, sampling, results.records if results else []):
            if results:
                results.add(record)
            if arguments.json:
                print(json.dumps(record), flush=True)
    for fault in faults:
        print(f"sva: {fault}; skipped", file=sys.stderr)
    if faults:
        raise UserError(f"{len(faults)} of {lines} lines were skipped, the others are answered")


def _prompts(arguments: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    if bool(arguments.prompts) == bool(arguments.file):
        raise UserError("give prompts as arguments or with --file, and not both")
    if not arguments.file:
        if not all(prompt.strip() for prompt in arguments.prompts):
            raise UserError("a prompt is empty; give it some text")
        return [Prompt(number, text) for number, text in enumerate(arguments.prompts, 1)], []
    if arguments.file == "-":
        return read_prompts(sys.stdin.buffer, "standard input", jsonl=False)
    try:
        with open(local_path(arguments.file, "--file"), "rb") as file:
            prompts, faults = read_prompts(file, arguments.file, jsonl=arguments.file.endswith(".jsonl"))
    except OSError as error:
        raise UserError(f"--file {arguments.file} cannot be read: {error.strerror}") from None
    if not prompts and not faults:
        raise UserError(f"--file {arguments.file} holds no prompt")
    return prompts, faults


def _answers(
    lm: Any,
    prompts: list[Prompt],
    faults: list[str],
    arguments: argparse.Namespace,
    sampling: Any,
    known: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """A record an answer, as they are finished; on the screen they are shown in order, a single one as it comes."""
    import jax

    from sva.generation.complete import CompleteOptions, complete
    from sva.generation.engine import EngineConfig
    from sva.utils import seeds
    from sva.utils.padding import batch_bucket

    done = {(record["line"], record["sample"]) for record in known}
    wanted = range(arguments.samples)
    todo = [prompt for prompt in prompts if not all((prompt.line, sample) in done for sample in wanted)]
    rows = [_tokens(lm, prompt, arguments, faults) for prompt in todo]
    todo = [prompt for prompt, row in zip(todo, rows, strict=True) if row is not None]
    rows = [row for row in rows if row is not None]
    if not todo:
        return
    key = seeds.key(arguments.seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.asarray([prompt.line for prompt in todo]))
    two_passes = arguments.expert and not arguments.alphas
    chosen, mixtures = _first_pass(lm, todo, arguments) if two_passes else ([{}] * len(todo), None)
    quiet = arguments.json or arguments.out
    alone = not quiet and len(todo) * arguments.samples == 1

    def show(prompt: int, sample: int, text: str) -> None:
        print(text, end="", flush=True)

    if alone and chosen[0]:
        print(_heading(chosen[0]), end=" ", flush=True)
    options = CompleteOptions(
        mixtures=mixtures,
        engine=EngineConfig(rows=min(arguments.rows, batch_bucket(len(todo) * arguments.samples))),
        show=show if alone else None,
        title=None if alone else "generate",
    )
    waiting: dict[tuple[int, int], dict[str, Any]] = {}
    order = iter([(prompt.line, sample) for prompt in todo for sample in wanted])
    following = next(order)
    for found in complete(
        lm,
        rows,
        arguments.max_new_tokens,
        sampling=sampling,
        key=keys,
        samples=arguments.samples,
        stops=arguments.stop,
        options=options,
    ):
        prompt = todo[found.prompt]
        if (prompt.line, found.sample) in done:
            continue
        record = {"line": prompt.line, "sample": found.sample, "prompt": prompt.text, "text": found.text}
        record |= {"tokens": len(found.tokens), "logprob": float(found.logprobs.sum()), "reason": found.reason}
        record |= chosen[found.prompt]
        if alone:
            print()
        elif not quiet:
            waiting[prompt.line, found.sample] = record
            while following in waiting:
                ready = waiting.pop(following)
                print(" ".join(filter(None, [_heading(ready), ready["text"]])), flush=True)
                following = next(order, (0, 0))
        yield record


def _tokens(lm: Any, prompt: Prompt, arguments: argparse.Namespace, faults: list[str]) -> list[int] | None:
    """The prompt's token ids; None for a line of a file that the model cannot read, and a sentence more in `faults`."""
    from sva.generation import chat

    context = lm.model.cfg.max_position_embeddings
    line = f"{arguments.file} line {prompt.line}"
    try:
        (ids,) = chat.tokenize(lm, [prompt.text if arguments.raw else chat.render(lm, prompt.text)])
    except chat.TokenError as error:
        if not arguments.file or error.by_template:
            raise
        faults.append(f"{line}: {error}")
        return None
    if arguments.file and not 0 < len(ids) <= context - arguments.max_new_tokens:
        faults.append(
            f"{line} has {len(ids)} tokens, which with --max-new-tokens {arguments.max_new_tokens} does not fit the "
            f"model's context of {context}"
        )
        return None
    return ids


def _first_pass(lm: Any, todo: Sequence[Prompt], arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """(what was chosen for each prompt, the mixtures)."""
    from sva.adaptation.adaptive_lm import adaptive
    from sva.adaptation.experts import load_experts
    from sva.adaptation.label_scoring import choice
    from sva.generation.complete import Mixtures

    if arguments.raw:
        raise UserError("--raw has no question to classify; leave it out, or merge one expert with sva expert export")
    experts, classifier = load_experts(lm, arguments.expert, arguments.classifier, skip_foreign=arguments.skip_foreign)
    model = adaptive(lm, experts, classifier=classifier, choice=choice(arguments.choice))
    decision = model.choose([prompt.text for prompt in todo])
    chosen = [{"label": label, "prob": prob} for label, prob in model.named(decision)]
    return chosen, Mixtures(model.serving.bank, decision.alphas)


def _mixed(lm: Any, arguments: argparse.Namespace) -> Any:
    """The model with the mixture of --alphas merged into it."""
    from sva.adaptation.experts import load_experts
    from sva.adaptation.mixture_file import load_mixture

    experts, _ = load_experts(lm, arguments.expert, None, skip_foreign=arguments.skip_foreign)
    return load_mixture(lm, arguments.alphas, experts)


def _heading(record: Mapping[str, Any]) -> str:
    return f"[{record['label']} {record['prob']:.0%}]" if "label" in record else ""
