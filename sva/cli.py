"""The `sva` command. Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sva import expert_commands
from sva.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        from sva import runtime

        runtime.start()
        arguments.run(arguments)
    except UserError as error:
        print(f"sva: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsva: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sva", description="Train, mix and serve singular-value experts for language models."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    model: dict[str, Any] = {
        "default": "smollm2-135m-instruct",
        "help": "path, hub id or known name (default: %(default)s)",
    }
    sub = command("demo", _demo, "Train one expert live, load others, answer a mixed set in two passes.")
    sub.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where results go (default: %(default)s)")
    sub = command("fetch", _fetch, "Find or download a model and print where it is.")
    sub.add_argument("model", nargs="?", **model)
    sub = command("decompose", _decompose, "Decompose the target weights of a model, and keep them in the cache.")
    sub.add_argument("model", nargs="?", **model)
    sub.add_argument("--targets", default="mlp", help="mlp, attention, attention_full, all or a regular expression")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model they are for")
    sub.add_argument("--rank", type=int, help="components to keep, for the delta form alone (default: all)")
    sub.add_argument("--share", default="0/1", metavar="I/N", help="of N processes with one cache, this is number I")
    sub = command("train", _train, "Train one expert, or go on where its run directory stopped.")
    sub.add_argument("config", help="a YAML file, see configs/")
    sub.add_argument("overrides", nargs="*", metavar="name=value", help="settings on top of it, e.g. train.lr=2e-3")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub = command("evaluate", _evaluate, "Accuracy of a model, with or without an expert, on a task's held-out rows.")
    sub.add_argument("task", help="a task's name, or a .jsonl file")
    sub.add_argument("--model", **model)
    sub.add_argument("--expert", type=Path, help="an expert file to merge first")
    sub.add_argument("--split", default="test")
    sub.add_argument("--size", type=int, default=200, help="rows at most (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub = command("generate", _generate, "Answer prompts; with experts, in two passes.")
    sub.add_argument("prompts", nargs="+", help="questions, each one argument")
    sub.add_argument("--model", **model)
    sub.add_argument("--expert", type=Path, action="append", default=[], help="an expert file; may be repeated")
    sub.add_argument("--classifier", type=Path, help="a classification expert for the first pass (task: routing)")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    sub = command("bench", _bench, "Prefill and decode rates of a model on this machine, beside the machine's limits.")
    sub.add_argument("--model", **model)
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "int8"], help="of the weights")
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="rows decoded together (default: 1 32)")
    sub.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (default: %(default)s)")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="of each row (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    expert_commands.add(commands, model)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from sva.demo import demo

    demo(arguments.dir)


def _fetch(arguments: argparse.Namespace) -> None:
    from sva.fetch import resolve

    print(resolve(arguments.model))


def _decompose(arguments: argparse.Namespace) -> None:
    from sva.lm import decompose_checkpoint

    index, _, count = arguments.share.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UserError(f"--share {arguments.share} must be I/N, as 0/4 for the first of four processes")
    directory, records = decompose_checkpoint(
        arguments.model,
        arguments.targets,
        arguments.dtype,
        rank=arguments.rank,
        share=(int(index), int(count)),
    )
    worst = max((record.relative_error for record in records), default=0.0)
    total = sum(record.rank for record in records)
    print(f"{len(records)} weights, {total} singular values, relative error at most {worst:.1e}, in {directory}")


def _train(arguments: argparse.Namespace) -> None:
    from sva import config, runs

    settings = config.load(arguments.config, arguments.overrides)
    _, result = runs.train_expert(settings)
    _print(result, arguments.json, f"expert: {Path(settings.run_dir) / 'expert.safetensors'}\n{summary(result)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    import numpy as np

    from sva import evaluate
    from sva.lm import decompose, load, merge
    from sva.spectral.expert import Expert
    from sva.stats import accuracy
    from sva.tasks import task

    if arguments.size < 1:
        raise UserError(f"--size {arguments.size} must be at least 1")
    todo = evaluate.items(task(arguments.task), arguments.split, arguments.size)
    lm = load(arguments.model)
    if arguments.expert:
        expert = Expert.load(arguments.expert, fingerprint=lm.fingerprint, base=lm.name)
        spectra = decompose(lm, str(expert.metadata["targets"]))
        lm = merge(lm, spectra, expert.middles(spectra))
    records = evaluate.evaluate(lm, todo)
    score = accuracy(np.array([record.correct for record in records]))
    result = {"task": arguments.task, "model": lm.name, "quantisation": lm.quantisation, "n": len(records)}
    result |= {"accuracy": score._asdict(), "records": [record._asdict() for record in records]}
    text = f"{arguments.task}: {percent(score._asdict())}, n = {len(records)}, weights {lm.quantisation or 'as stored'}"
    _print(result, arguments.json, text)


def _generate(arguments: argparse.Namespace) -> None:
    from sva import chat
    from sva.adaptive import build
    from sva.lm import load
    from sva.spectral.expert import Expert

    if not all(prompt.strip() for prompt in arguments.prompts):
        raise UserError("a prompt is empty; give it some text")
    if arguments.classifier and not arguments.expert:
        raise UserError("--classifier chooses between experts; name them with --expert")
    lm = load(arguments.model)
    if arguments.expert:
        paths = [*arguments.expert, *([arguments.classifier] if arguments.classifier else [])]
        loaded = [Expert.load(path, fingerprint=lm.fingerprint, base=lm.name) for path in paths]
        experts = loaded[: len(arguments.expert)]
        classifier = loaded[-1] if arguments.classifier else None
        model = build(lm, experts, classifier=classifier)
        for answer in model.answer(arguments.prompts, arguments.max_new_tokens):
            print(f"[{answer.label} {answer.prob:.0%}] {answer.text}")
        return
    ids, mask = chat.encode(lm, [chat.render(lm, prompt) for prompt in arguments.prompts])
    out = lm.generate(ids, mask, arguments.max_new_tokens, chat.end_tokens(lm))
    print("\n".join(chat.decode(lm, out.tokens, out.lengths)))


def _bench(arguments: argparse.Namespace) -> None:
    from sva.bench import bench, table
    from sva.lm import load
    from sva.runs import command, versions

    lm = load(arguments.model, arguments.dtype)
    result = bench(lm, arguments.batch, prompt=arguments.prompt, new_tokens=arguments.max_new_tokens)
    _print(result | {"versions": versions(), "command": command()}, arguments.json, table(result))


def summary(result: dict[str, Any]) -> str:
    """A training result in one line."""
    return (
        f"{result['task']}: {percent(result['before'])} before, {percent(result['after'])} after, "
        f"gain {percent(result['gain'])} (greedy, {result['split']}, n = {result['n']})"
    )


def percent(interval: dict[str, float]) -> str:
    """'72.0 % [65.3, 77.9]'."""
    return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)


if __name__ == "__main__":
    sys.exit(main())
