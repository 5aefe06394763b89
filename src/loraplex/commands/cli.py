"""The `loraplex` command. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from loraplex.export.servers import ENGINES, PORTABLE
from loraplex.version import __version__

_TRAIN_HELP = """\
Every key of RUN.yaml can be overridden: --key value or --key=value, dotted for the sections. Values are YAML.

  --model M                 hub id, local folder, or package:NAME
  --gguf_file F             GGUF file in the model's folder or repository
  --dtype T                 float32, bfloat16 or auto
  --task T                  sft (causal language model) or classification
  --method M                masa, aslora, dual_lora, multilora, lora, another of PEFT's (loha, adalora, …), or a
                            config class of your own, package.module:Class
  --adapter.FIELD V         a field of the method's config: r, lora_alpha, target_modules, …
  --data.N.FIELD V          a field of data set N (from 0): path, weight, prompt, response, eval_size, …
  --train.FIELD V           learning_rate, max_steps, per_device_train_batch_size, eval_steps, seed, …,
                            on_nonfinite (stop or skip, at a NaN or Inf in loss or gradients), chat (false: plain
                            text where the tokenizer has a chat template),
                            and any other field of TRL's SFTConfig or transformers' TrainingArguments
  --output_dir DIR          where adapter, checkpoints, metrics.jsonl and loss.png go

example:
  loraplex train configs/masa.yaml --method aslora --adapter.r 16 --train.learning_rate 1e-4

Ctrl-C ends training after the current step and leaves a checkpoint; --resume continues from it.
All keys: docs/cli.md."""

_EVAL_HELP = """\
The run.yaml that training left beside the adapter says which data to use and how; its keys can be overridden as
for train (--data.0.eval_size 200, --train.per_device_eval_batch_size 32, --model PATH).

example:
  loraplex eval runs/masa --base"""

_MERGE_HELP = """\
The same as loraplex export --format merged.

example:
  loraplex merge runs/aslora -o merged/aslora --safe"""

_EXPORT_HELP = """\
--format lora writes a plain LoRA that needs no loraplex: one rank, lora_alpha = r, scaling inside B. It is exact for
MultiLoRA, ASLoRA and MASA with "sum" or "concat"; Dual LoRA needs --rank or --max-error, and its error is printed.
--format merged writes a whole model, one file at a time. It is exact for Dual LoRA too, up to rounding, which is
printed. MASA with a router has no constant update, because its gates depend on the input: --calibration exports its
mean gates and measures what they miss; alone it takes the data of the adapter's own run.

examples:
  loraplex export runs/masa -o lora/masa --engine vllm
  loraplex export runs/multilora -o lora/multilora --max-error 0.01
  loraplex export runs/dual -o merged/dual --format merged"""

_EXEC_HELP = """\
PROGRAM is a console script of this environment, -m and a module, or a Python file. It runs in this process: arguments,
exit code and signals are its own. Python processes that it starts know the methods too.

examples:
  loraplex exec lm_eval --model hf --model_args pretrained=BASE,peft=runs/masa --tasks hellaswag
  loraplex exec accelerate launch train.py
  loraplex exec -m my_package.serve --adapter runs/masa"""

_CACHE_HELP = """\
Servers that load our folders through loraplex.to_plain find the plain LoRA here ($LORAPLEX_CACHE/plain). It holds at
most $LORAPLEX_CACHE_GIB (20); the least recently used are removed first, and never what a running server holds.

examples:
  loraplex cache
  loraplex cache clear"""

_BUDGET_HELP = """\
Nothing is loaded but the model's config. Without --match or --params each method is counted at its defaults and the
settings below; with one of them r is what comes nearest. Settings hold for the methods that have them:

  --adapter.FIELD V         a field of the methods' configs: r, target_modules, num_experts, …
  --revision R, --gguf_file F, --trust_remote_code true
                            where the model is from

examples:
  loraplex budget package:smollm2-135m
  loraplex budget meta-llama/Llama-3.1-70B --match lora:r=16 --adapter.target_modules all-linear
  loraplex budget ./model --params 0.5% --methods masa,aslora --tokens 8192 --dtype bfloat16 --autocast"""

_COMPARE_HELP = """\
STUDY.yaml names a model, tasks, methods, learning rates and seeds (configs/studies/ has examples). Every method tries
the same number of learning rates on the eval parts; the best one is trained with every seed and tested once. Keys can
be overridden as for train: --seeds [0,1] --budget lora:r=4 --train.max_steps 20.

A study can be killed and started again: a finished cell is never trained or tested again. Its folder gets report.html,
report.md, results.csv, results.json, and every cell's configuration, metrics and adapter.

examples:
  loraplex compare configs/studies/quick.yaml
  loraplex compare configs/studies/quick.yaml --report"""

# Options of the commands that take overrides; any other --option is one.
_TRUST = {"--trust-remote-code", "--allow-code"}
_OWN_OPTIONS = {
    "train": {"--resume", "--dry-run", "--trust-remote-code", "--debug", "--help"},
    "eval": {
        *(
            "--run",
            "--data",
            "--base",
            "--test",
            "--harness",
            "--harness-path",
            "--limit",
            "--fewshot",
            "--chat",
            "--json",
        ),
        *("--debug", "--help", *_TRUST),
    },
    "merge": {
        *("--run", "--safe", "--allow-nonfinite", "--calibration", "--dtype", "--force", "--output", "--json"),
        *("--debug", "--help", *_TRUST),
    },
    "export": {
        *("--run", "--format", "--engine", "--compress", "--rank", "--max-error", "--dtype", "--calibration", "--safe"),
        *("--allow-nonfinite", "--force", "--output", "--remember", "--json", "--debug", "--help", *_TRUST),
    },
    "compare": {"--jobs", "--dry-run", "--report", "--trust-remote-code", "--debug", "--help"},
    "budget": {
        *("--methods", "--match", "--params", "--tokens", "--dtype", "--task", "--autocast"),
        *("--trust-remote-code", "--json", "--debug", "--help"),
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "loraplex", description="Fine-tune with MASA, ASLoRA, Dual LoRA and MultiLoRA.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"loraplex {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    def add_trust(command: argparse.ArgumentParser, folder: bool) -> None:
        command.add_argument(
            "--trust-remote-code", action="store_true", help="run the code that the model brings along"
        )
        if folder:
            command.add_argument(
                "--allow-code",
                action="append",
                default=[],
                metavar="module:Class",
                help="import the method that ADAPTER's own run.yaml names; repeatable",
            )

    train = add("train", "train an adapter as a YAML file says", _TRAIN_HELP)
    train.add_argument("run", metavar="RUN.yaml", type=Path, help="the run's configuration")
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output_dir")
    train.add_argument("--dry-run", action="store_true", help="check the configuration, print it resolved, and stop")
    add_trust(train, folder=False)

    evaluate = add("eval", "measure an adapter on held-out data, task by task", _EVAL_HELP)
    evaluate.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a saved adapter")
    evaluate.add_argument("--run", metavar="RUN.yaml", type=Path, help="take data and model from this run")
    evaluate.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help="file, hub id, package:NAME or '{path: …}'; repeatable",
    )
    evaluate.add_argument("--base", action="store_true", help="measure the base model too")
    evaluate.add_argument("--test", action="store_true", help="measure on the part held out by test_…, not by eval_…")
    evaluate.add_argument("--harness", metavar="A,B", help="tasks of lm-evaluation-harness, instead of the run's data")
    evaluate.add_argument("--harness-path", metavar="DIR", type=Path, help="a folder of task files of your own")
    evaluate.add_argument("--limit", type=int, metavar="N", help="of the harness: the first N examples of each task")
    evaluate.add_argument("--fewshot", type=int, metavar="N", help="of the harness: examples in the prompt")
    evaluate.add_argument("--chat", action="store_true", help="of the harness: use the tokenizer's chat template")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_trust(evaluate, folder=True)

    export = add("export", "write an adapter as a plain LoRA or a merged model that servers load", _EXPORT_HELP)
    export.add_argument("--format", choices=("lora", "merged"), default="lora", help="default: lora")
    export.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default=PORTABLE,
        help="what is to load it; portable (the default) suits all, others print how to serve",
    )
    export.add_argument("--compress", choices=("exact",), help="find the true rank of each update")
    export.add_argument("--rank", type=int, metavar="R", help="the best approximation of rank R")
    export.add_argument(
        "--max-error", type=float, metavar="E", help="the smallest rank that keeps every module's error ≤ E of ‖ΔW‖"
    )
    merge = add("merge", "merge an adapter into its base model and save a plain model", _MERGE_HELP)
    for command in (export, merge):
        command.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a saved adapter")
        command.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="where the export goes")
        command.add_argument("--run", metavar="RUN.yaml", type=Path, help="take the base model from this run")
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the file's tensors")
        command.add_argument("--safe", action="store_true", help="stop if a merged weight is not finite")
        command.add_argument(
            "--allow-nonfinite", action="store_true", help="write an adapter that holds NaN or Inf as it is"
        )
        command.add_argument(
            "--calibration", nargs="*", metavar="DATA", help="data for MASA's mean gates; alone, the run's own"
        )
        command.add_argument("--force", action="store_true", help="replace DIR if it is not empty")
        command.set_defaults(remember=False)
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        add_trust(command, folder=True)

    export.add_argument(
        "--remember",
        action="store_true",
        help="write rank and mean gates into ADAPTER/loraplex.json: servers that load ADAPTER itself use them",
    )

    program = add("exec", "run another Python program with the methods registered", _EXEC_HELP)
    program.add_argument("program", metavar="PROGRAM", help="a console script, -m MODULE, or a Python file")
    program.add_argument("arguments", metavar="ARG", nargs="*", help="its own arguments, passed on as they are")

    cache = add("cache", "list or clear the adapters that were converted for servers", _CACHE_HELP)
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list", help="default: list")
    cache.add_argument("--json", action="store_true", help="print JSON instead of a table")

    budget = add("budget", "plan parameters, memory and file size of each method from a model's config", _BUDGET_HELP)
    budget.add_argument("model", metavar="MODEL", help="hub id, local folder, or package:NAME; a config is enough")
    budget.add_argument("--methods", metavar="A,B", help="default: masa,aslora,dual_lora,multilora,lora")
    budget.add_argument(
        "--match", metavar="METHOD:FIELD=V", help="as many trainable parameters as this adapter has: lora:r=16"
    )
    budget.add_argument("--params", metavar="N", help="as many as this: 2M, 300k, 4194304, or 0.5%% of the base model")
    budget.add_argument("--tokens", type=int, default=4096, metavar="T", help="of a step: batch × length; default 4096")
    budget.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the base weights; default: the config's",
    )
    budget.add_argument("--task", choices=("sft", "classification"), default="sft", help="default: sft")
    budget.add_argument("--autocast", action="store_true", help="the step runs under autocast, as train does on a GPU")
    budget.add_argument("--json", action="store_true", help="print JSON, sizes in bytes, instead of tables")
    add_trust(budget, folder=False)

    compare = add("compare", "compare methods on your model and data, at one budget", _COMPARE_HELP)
    compare.add_argument("study", metavar="STUDY.yaml", type=Path, help="what to compare")
    compare.add_argument("--jobs", type=int, metavar="N", help="cells at a time; default: one per GPU, or one")
    compare.add_argument(
        "--dry-run", action="store_true", help="check the study, print its methods and cells, and stop"
    )
    compare.add_argument("--report", action="store_true", help="only write the report, from the cells that have run")
    add_trust(compare, folder=False)

    inspect = add("inspect", "show an adapter's parameters, sharing map and merge history")
    inspect.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a saved adapter")
    inspect.add_argument(
        "--against", metavar="SOURCE", type=Path, help="of an exported LoRA: its error against the adapter it came from"
    )
    inspect.add_argument(
        "--plots", metavar="DIR", type=Path, help="draw spectra of the updates and what is particular to the method"
    )
    inspect.add_argument(
        "--with-data",
        action="store_true",
        help="with --plots: which experts MASA's router uses on the run's held-out data",
    )
    inspect.add_argument("--method", metavar="M", help="the adapter's, where it is a class of your own: module:Class")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_trust(inspect, folder=True)
    return parser


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of the command itself, `--key value` overrides)."""
    own: list[str] = []
    overrides: list[str] = []
    known = _OWN_OPTIONS.get(argv[0]) if argv else None
    if known is None:
        return list(argv), []
    rest = list(argv)
    while rest:
        if rest[0] == "--trust-remote-code" and rest[1:2] and rest[1].lower() in ("true", "false"):
            rest[:2] = [f"--trust_remote_code={rest[1]}"]  # with a value it is the run's key like any other
        argument = rest.pop(0)
        if not argument.startswith("--") or argument.partition("=")[0] in known:
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def main(argv: Sequence[str] | None = None, begin: Callable[[], None] = lambda: None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error of the user's, 130 / 143 for a signal.

    Args:
        argv: the command line; None takes the process's.
        begin: called once it is read, before the command does anything.
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 1 and argv[0] == "exec" and argv[1] not in ("-h", "--help", "--debug"):
        # Before everything else: the options after it are not ours, nor are the program's errors.
        begin()
        return _exec(argv[1:])
    own, overrides = split_overrides(argv)
    args = build_parser().parse_args(own)
    if args.command in _OWN_OPTIONS and args.trust_remote_code:
        overrides += ["--trust_remote_code", "true"]
    try:
        begin()
        return _COMMANDS[args.command](args, overrides)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        return _fail(args, error, _missing_module(error))
    except (ValueError, OSError) as error:
        return _fail(args, error, str(error))


def _fail(args: argparse.Namespace, error: Exception, message: str) -> int:
    if args.debug:
        raise error
    from loraplex.io.reading import message_of

    print(f"error: {message_of(message)}", file=sys.stderr)
    return 2


def _missing_module(error: ModuleNotFoundError) -> str:
    extra = {"trl", "datasets", "pydantic", "yaml", "gguf", "matplotlib", "psutil", "scipy"}
    if error.name == "lm_eval":
        return 'lm-evaluation-harness is not installed: pip install "loraplex[eval]"'
    if error.name in extra:
        return f'{error.name} is not installed: pip install "loraplex[train]"'
    return str(error)


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.recipes.config.arguments import adapter_config, check_train
    from loraplex.recipes.config.run_config import load_run, parse_overrides, to_yaml

    config = load_run(args.run, parse_overrides(overrides))
    check_train(config)
    if args.dry_run:
        adapter_config(config)
        print(to_yaml(config), end="")
        return 0
    from loraplex.commands.report import print_summary
    from loraplex.recipes.prepare import PreparedRun
    from loraplex.recipes.progress import is_main, note
    from loraplex.recipes.training.checkpoints import RUN_NAME, checkpoints
    from loraplex.recipes.training.run import train

    run = PreparedRun(config, resume=args.resume)
    resuming = f"continue with: loraplex train {run.output_dir / RUN_NAME} --resume"
    try:
        result = train(run)
    except KeyboardInterrupt:
        if not checkpoints(run.output_dir):
            raise
        note(f"\nstopped at once\n{resuming}")
        return 130
    except (RuntimeError, MemoryError) as error:
        from loraplex.recipes.training.memory import explain, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail(args, error, explain(run, error))
    if result.signal is None:
        if is_main():
            print_summary(result)
        return 0
    note(f"stopped at step {result.step}, checkpoint in {result.checkpoint}\n{resuming}")
    return 128 + result.signal


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.commands.report import print_metrics
    from loraplex.recipes.adapters.saved import evaluate_adapter, open_adapter
    from loraplex.recipes.config.run_config import parse_overrides

    if args.harness is None:
        if args.harness_path or args.limit or args.fewshot or args.chat:
            raise ValueError("--harness-path, --limit, --fewshot and --chat belong to --harness: name its tasks.")
        adapter = open_adapter(
            args.adapter, args.run, args.data, parse_overrides(overrides), allow_code=args.allow_code
        )
        report = evaluate_adapter(adapter, args.base, "test" if args.test else "eval")
    else:
        from loraplex.recipes.adapters.harness import Harness, evaluate_by_harness

        if args.data or args.test:
            raise ValueError("--harness brings its own data: leave --data and --test out.")
        given = parse_overrides(overrides)
        adapter = open_adapter(args.adapter, args.run, [], given, data_option=None, allow_code=args.allow_code)
        for option, value, least in (("--limit", args.limit, 1), ("--fewshot", args.fewshot, 0)):
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"{option} {value}: give at least {least}.")
        harness = Harness(args.harness.split(","), args.harness_path, args.limit, args.fewshot, args.chat)
        report = evaluate_by_harness(adapter, harness, args.base)
    config = adapter.run.config
    if args.json:
        _print_json({"adapter": str(args.adapter), "model": config.model, "method": config.method, "tasks": report})
    else:
        print_metrics(report, f"{args.adapter} on {config.model}")
    return 0


def _merge(args: argparse.Namespace, overrides: list[str]) -> int:
    return _write_export(args, overrides, format="merged")


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.export.lora import Rank

    rank = Rank(args.compress == "exact", args.rank, args.max_error)
    if args.format == "merged" and (rank != Rank() or args.engine != PORTABLE):
        raise ValueError("a merged model has no rank and suits every engine: leave --rank, --engine and the like out.")
    if args.remember and (args.format == "merged" or (rank == Rank() and args.calibration is None)):
        raise ValueError(
            "--remember is for a LoRA's rank (--compress, --rank, --max-error) and --calibration: give one."
        )
    return _write_export(args, overrides, format=args.format, engine=args.engine, rank=rank)


def _write_export(args: argparse.Namespace, overrides: list[str], **settings: Any) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.commands.report import print_export
    from loraplex.recipes.adapters.exporting import ExportJob, export_adapter, remember
    from loraplex.recipes.adapters.saved import open_adapter
    from loraplex.recipes.config.run_config import parse_overrides
    from loraplex.tuner.finite import allow_nonfinite

    adapter = open_adapter(
        args.adapter,
        args.run,
        [],
        parse_overrides(overrides),
        data_option="--calibration DATA" if args.calibration == [] else None,
        allow_code=args.allow_code,
    )
    job = ExportJob(
        target=args.output,
        dtype=args.dtype,
        calibration=args.calibration,
        safe=args.safe,
        force=args.force,
        **settings,
    )
    with allow_nonfinite() if args.allow_nonfinite else nullcontext():
        export, calibration = export_adapter(adapter, job)
    if args.remember:
        remember(args.adapter, job, calibration)
    if args.json:
        _print_json({**export.to_dict(), "calibration": calibration.to_dict() if calibration else None})
    else:
        print_export(export, calibration)
    return 0


def _exec(arguments: Sequence[str]) -> Any:
    from loraplex.integrations.run_program import find_program
    from loraplex.io.reading import message_of

    try:
        run = find_program(arguments)
    except ValueError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    return run()


def _cache(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.export.plain_cache import PlainCache, print_entries

    cache = PlainCache()
    held = cache.clear() if args.action == "clear" else []
    if held:
        print(f"{len(held)} stay: running servers hold them", file=sys.stderr)
    entries = held if args.action == "clear" else cache.entries()
    if args.json:
        _print_json({"folder": str(cache.root), "entries": [entry.to_dict() for entry in entries]})
    else:
        print_entries(cache, entries)
    return 0


def _budget(args: argparse.Namespace, overrides: list[str]) -> int:
    gc.disable()  # a short command with millions of small objects and little garbage: a second of ten for 70B
    from loraplex.recipes.console import quiet

    quiet(data=False)
    from loraplex.commands.report import print_budgets
    from loraplex.recipes.config.run_config import parse_overrides
    from loraplex.recipes.models.budgeting import BudgetJob, plan_methods

    chosen: dict[str, Any] = (
        {} if args.methods is None else {"methods": [method.strip() for method in args.methods.split(",")]}
    )
    names = ("model", "match", "params", "tokens", "dtype", "task", "autocast")
    job = BudgetJob(**chosen, **{name: getattr(args, name) for name in names})
    report = plan_methods(job, parse_overrides(overrides))
    if args.json:
        _print_json(report.to_dict())
    else:
        print_budgets(report)
    return 0


def _study(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.recipes.config.run_config import parse_overrides
    from loraplex.study.config import load_study
    from loraplex.study.report import HTML_NAME, write_report
    from loraplex.study.run import choose_rates, prepare, run_study
    from loraplex.study.terminal import print_plan, print_results

    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: give at least 1.")
    study = load_study(args.study, parse_overrides(overrides))
    state = prepare(study)
    if args.dry_run:
        print_plan(state)
        return 0
    if args.report:
        if not Path(study.output_dir).is_dir():
            raise ValueError(f"output_dir {study.output_dir} does not exist, so there is nothing to report.")
        state.choices = choose_rates(state)
    else:
        print_plan(state)
        run_study(state, args.jobs)
    print_results(study, write_report(state))
    print(f"report: {Path(study.output_dir) / HTML_NAME}")
    if state.stopped:
        command = shlex.join(["loraplex", "compare", str(args.study), *overrides])
        print(f"continue with: {command}", file=sys.stderr)
        return 130
    return 0


def _inspect(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.commands.report import print_description
    from loraplex.inspection.describe import describe
    from loraplex.io.files import recover

    recover(args.adapter)
    if not args.adapter.is_dir():
        raise FileNotFoundError(f"adapter {args.adapter} is not a folder: give the folder of a saved adapter.")
    typed: list[tuple[str, Any]] = [("trust_remote_code", True)] if args.trust_remote_code else []
    if args.method is not None:
        from loraplex.recipes.config.arguments import config_class

        config_class(args.method)
    if args.allow_code:
        from loraplex.recipes.adapters.saved import import_allowed

        import_allowed(args.allow_code)
    description = describe(args.adapter)
    if args.against is not None:
        description.against = _compare(args.adapter, args.against, typed, args.allow_code)
    if args.plots is None:
        if args.with_data:
            raise ValueError("--with-data is for plots: give --plots DIR.")
        if args.json:
            _print_json(description.to_dict())
        else:
            print_description(description, args.adapter)
        return 0
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.commands.report import print_analysis
    from loraplex.inspection.plots import draw
    from loraplex.recipes.adapters.looking import analyse_folder

    typed += [] if args.method is None else [("method", args.method)]
    analysis = analyse_folder(args.adapter, args.with_data, typed, args.allow_code)
    written = draw(analysis, args.plots)
    if args.json:
        _print_json({**description.to_dict(), "analysis": analysis.to_dict(), "plots": [str(path) for path in written]})
    else:
        print_description(description, args.adapter)
        print_analysis(analysis, written)
    return 0


def _compare(exported: Path, source: Path, typed: list[tuple[str, Any]], allow_code: Sequence[str]) -> dict[str, float]:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.export.lora_format import compare
    from loraplex.recipes.adapters.saved import open_adapter

    adapter = open_adapter(source, None, [], typed, data_option=None, allow_code=allow_code)
    return compare(exported, adapter.load_on_skeleton())


def _print_json(value: dict[str, Any]) -> None:
    from loraplex.io.reading import json_text

    print(json_text(value))


_COMMANDS = {
    "train": _train, "eval": _eval, "compare": _study, "export": _export, "merge": _merge, "budget": _budget,
    "inspect": _inspect, "cache": _cache,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
