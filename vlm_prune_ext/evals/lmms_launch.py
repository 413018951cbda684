"""``run_lmms.sh MODEL TASKS [key=value ...]``: check everything, then start lmms-eval.

lmms-eval itself only warns when a plug-in does not load, names its output folder after the
checkpoint alone, and ends with exit code 0 when an evaluation fails. Here names are checked first
(exit code 2, one sentence), each configuration gets a folder of its own, and a run without results
ends with exit code 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_prune_ext.errors import InputError, make_folder, unknown_name
from vlm_prune_ext.evals.lmms_plugin import (
    GROUP,
    accepted_keys,
    class_of,
    method_keys,
    method_of,
    models,
    run_label,
    value_of,
)
from vlm_prune_ext.evals.precheck import check_backend, check_served
from vlm_prune_ext.experiment.report import say

TASKS = Path(__file__).parent / "tasks"

USAGE = """\
usage: run_lmms.sh MODEL TASKS [key=value ...]

MODEL   one of: {models}
TASKS   task names with commas between; local ones: {tasks}
keys    of the model   pretrained (default: the demo checkpoint), dtype, device, device_map,
                       revision, conv_template, attn_implementation, trust_remote_code,
                       min_pixels, max_pixels, preprocess, frames, fps, video_budget, backend
                       (vllm: docs/serve.md), tensor_parallel_size, max_model_len,
                       gpu_memory_utilization (of vllm), and the method's parameters
                       (vlm-prune methods)
        of lmms-eval   {options}
        of the launch  {launch}
        data           folder made by `vlm-prune demo-data`, for the local tasks
The launch keys may also be given as environment variables in capitals: NUM_PROCESSES=2.
Without num_processes: all GPUs, else one process on the CPU.
"""

OPTIONS = (
    "batch_size",
    "max_batch_size",
    "limit",
    "offset",
    "output_path",
    "use_cache",
    "cache_requests",
    "log_samples_suffix",
    "include_path",
    "gen_kwargs",
    "num_fewshot",
    "seed",
    "repeats",
    "verbosity",
    "timezone",
    "reasoning_tags",
    "process_docs_parallel",
    "max_tokens",
)
"""Options of lmms-eval that are passed on with their value. A parameter of the method that has the
same name (``seed``) goes first."""

FLAGS = ("force_simple", "predict_only", "process_with_media", "show_config", "trust_remote_code")
"""Options of lmms-eval that are switched on by ``name=true``."""

LAUNCH = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
)
"""Options of ``accelerate launch``."""

_LIKELIHOOD = ("loglikelihood", "multiple_choice")


@dataclass(frozen=True)
class Plan:
    """What is to be run: the words of the command, changes of the environment, the folder."""

    command: list[str]
    environment: dict[str, str]
    output: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 0 with results, 1 without, 2 for wrong input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    try:
        plan = make_plan(words)
        make_folder(plan.output, "output_path=")
    except InputError as error:
        say(error, error=True)
        return 2
    print(" ".join(plan.command), flush=True)
    start = time.time()
    code = subprocess.run(plan.command, env={**os.environ, **plan.environment}).returncode
    if code:
        return code
    written = results_since(plan.output, start)
    if not written:
        print("lmms-eval wrote no results: see its messages above.", file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


def make_plan(words: Sequence[str]) -> Plan:
    """The command for ``MODEL TASKS [key=value ...]``.

    Raises:
        InputError: anything that would not run.
    """
    if len(words) < 2:
        raise InputError("MODEL and TASKS are needed: run_lmms.sh llava_fastv shapes_mcq.")
    model, tasks = words[0], [task for task in words[1].split(",") if task]
    if model not in models():
        raise unknown_name("model", model, models())
    given = parse_pairs(words[2:])
    settings, options, launch = sort_keys(model, given)
    _check_device(settings)
    served = value_of(settings.get("backend"))
    check_backend(served, {key: value_of(value) for key, value in settings.items()})
    if "device_map" in settings or served:  # one model over all GPUs, so one process
        launch.setdefault("num_processes", "1")
    label = run_label(model, settings)  # checks the method's parameters
    _check_registered(model)
    _check_tasks(tasks, options, served)
    _check_checkpoint(model, settings)
    _check_numbers(options)
    output = Path(options.pop("output_path", "") or f"logs/{label}")
    cpu = str(settings.get("device", "")) == "cpu" or not _gpus()
    evaluation = ["--model", model, "--tasks", ",".join(tasks)]
    evaluation += ["--model_args", ",".join(f"{k}={v}" for k, v in settings.items())]
    evaluation += ["--output_path", str(output), "--log_samples"]
    evaluation += _option_words({"batch_size": "1" if cpu and not served else "auto", **options})
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_words(launch, cpu)]
    environment = _environment(launch, cpu)
    if "data" in given:
        environment["VLM_PRUNE_DEMO_DATA"] = str(Path(given["data"]).expanduser().resolve())
    return Plan([*command, "-m", "lmms_eval", *evaluation], environment, output)


def _check_numbers(options: Mapping[str, str]) -> None:
    """lmms-eval itself ends in a traceback, after everything is loaded."""
    for key, whole in (("batch_size", True), ("max_batch_size", True), ("limit", False)):
        text = options.get(key)
        if text is None or text.startswith("auto") or (key, text) == ("limit", "-1"):
            continue
        try:
            number = int(text) if whole else float(text)
        except ValueError:
            number = 0
        if not number > 0 or number == float("inf"):
            accepted = "an integer of at least 1" if whole else "a count, or a share under 1"
            raise InputError(f"{key}={text} is not valid: {accepted}.")


def parse_pairs(words: Sequence[str]) -> dict[str, str]:
    """``key=value`` and ``--key=value`` words.

    Raises:
        InputError: another form, or a key given twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals or not key:
            raise InputError(f"{word!r} is not valid: key=value.")
        if key in pairs:
            raise InputError(f"{key} is given twice: once is accepted.")
        pairs[key] = value
    return pairs


def sort_keys(
    model: str, given: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Split keys into those of the model, of lmms-eval and of the launch.

    Raises:
        InputError: a key that is none of these, with the near name.
    """
    cls = class_of(model, given)
    mine = accepted_keys(model, cls) - {"batch_size", "max_batch_size"}
    settings: dict[str, str] = {}
    options: dict[str, str] = {}
    launch = {key: os.environ[key.upper()] for key in LAUNCH if os.environ.get(key.upper())}
    for key, value in given.items():
        if key in mine:
            settings[key] = value
        elif key in (*OPTIONS, *FLAGS):
            options[key] = value
        elif key in LAUNCH:
            launch[key] = value
        elif key != "data":
            raise unknown_name("key", key, {*mine, *OPTIONS, *FLAGS, *LAUNCH, "data"})
    return settings, options, launch


def launch_words(launch: Mapping[str, str], cpu: bool) -> list[str]:
    """Arguments of ``accelerate launch``."""
    machines = _count("num_machines", launch.get("num_machines", "1"))
    processes = _processes(launch, machines, cpu)
    words = ["--num_processes", str(processes), "--num_machines", str(machines)]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        # This starts the processes; that they work on the CPU is said by the environment.
        words.append("--multi_gpu")
    elif cpu:
        words.append("--cpu")
    if machines > 1:
        for key in ("machine_rank", "main_process_ip"):
            if key not in launch:
                raise InputError(f"num_machines={machines} needs {key}=... as well.")
    for key in ("machine_rank", "main_process_ip", "main_process_port"):
        if key in launch:
            words += [f"--{key}", launch[key]]
    if processes > 1 and machines == 1 and "main_process_port" not in launch:
        words += ["--main_process_port", "0"]  # any free one: another run may hold the default
    return words


def _processes(launch: Mapping[str, str], machines: int, cpu: bool) -> int:
    if "num_processes" in launch:
        return _count("num_processes", launch["num_processes"])
    return machines * (1 if cpu else _gpus())


def _environment(launch: Mapping[str, str], cpu: bool) -> dict[str, str]:
    if not cpu:
        return {}
    machines = _count("num_machines", launch.get("num_machines", "1"))
    here = max(1, _processes(launch, machines, cpu) // machines)
    threads = max(1, (os.cpu_count() or 1) // here)
    return {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Threads that wait by spinning bring a busy machine to a standstill.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def _count(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{name}={value!r} is not valid: an integer of at least 1.")
    return int(value)


def _check_device(settings: Mapping[str, Any]) -> None:
    from vlm_prune_ext.models import device_of

    device = settings.get("device")
    kind = device_of(str(device) if device else None).type
    if value_of(settings.get("fast")) is True and kind != "cuda":
        where = f"with device={device}" if device else "without a GPU"
        raise InputError(f"fast=true is not possible {where}: CUDA graphs need a GPU.")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _option_words(options: Mapping[str, str]) -> list[str]:
    words: list[str] = []
    for key, value in options.items():
        if key not in FLAGS:
            words += [f"--{key}", value]
        elif str(value_of(value)).lower() not in ("false", "0", "none"):
            words.append(f"--{key}")
    return words


def _check_registered(model: str) -> None:
    try:
        from lmms_eval.models import list_available_models
    except ImportError as error:
        raise InputError('lmms-eval is not installed here: pip install -e ".[lmms]".') from error
    if model not in list_available_models():
        raise InputError(
            f"lmms-eval does not know {model}: the entry point {GROUP!r} of vlm-prune-ext did not "
            "load (see the warning above). Install this package where lmms-eval is: "
            "pip install -e ."
        )


def _check_tasks(tasks: Sequence[str], options: dict[str, str], served: str | None) -> None:
    """Every task exists; tasks of this package are put on lmms-eval's search path."""
    if not tasks:
        raise InputError("TASKS is empty: task names with commas between.")
    local = local_tasks()
    others = [task for task in tasks if task not in local]
    if others and "include_path" in options:
        known = _all_tasks(options["include_path"])
    else:
        known = _all_tasks(None) if others else {}
    if len(others) < len(tasks):
        if "include_path" in options and Path(options["include_path"]).resolve() != TASKS:
            raise InputError(
                "include_path cannot be given for tasks of this package, which have their own: run "
                "the others separately."
            )
        options["include_path"] = str(TASKS)
    for task in others:
        if "*" not in task and task not in known:
            raise unknown_name("task", task, {*known, *local})
    kinds = {**known, **{task: local[task] for task in tasks if task in local}}
    scored = [task for task in tasks if kinds.get(task) in _LIKELIHOOD]
    if scored and served:
        raise InputError(
            f"backend={served} does not go with {scored[0]}: it scores no likelihoods."
        )
    if scored and "use_cache" in options:
        raise InputError(
            f"use_cache does not go with {scored[0]}: lmms-eval cannot read likelihoods back from "
            "its cache. Leave it out."
        )


def _check_checkpoint(model: str, settings: Mapping[str, str]) -> None:
    """The checkpoint is there and the method fits it."""
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.evals.precheck import check_fit
    from vlm_prune_ext.models.checkpoint import Checkpoint, check_trust

    source = Checkpoint(settings.get("pretrained") or CHECKPOINT, revision=settings.get("revision"))
    check_trust(source, value_of(settings.get("trust_remote_code")) is True)
    method = method_of(model, method_keys(settings))
    check_fit(source, method)
    if value_of(settings.get("backend")):
        check_served(source, method)


def local_tasks() -> dict[str, str]:
    """Tasks of this package -> their output type."""
    found = {}
    for path in sorted(TASKS.glob("*.yaml")):
        config = yaml.load(path.read_text(), _Loader)
        found[config["task"]] = config.get("output_type", "generate_until")
    return found


class _Loader(yaml.SafeLoader):
    """Reads task files without importing the functions they name."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _all_tasks(include: str | None) -> dict[str, Any]:
    """All tasks and groups that lmms-eval finds -> nothing known of their output type."""
    from lmms_eval.tasks import TaskManager

    return dict.fromkeys(TaskManager("ERROR", include_path=include).all_tasks)


def results_since(folder: Path, start: float) -> list[Path]:
    """Result files in ``folder`` that are not older than ``start``."""
    files = sorted(folder.rglob("*_results.json")) + sorted(folder.rglob("*_samples_*.jsonl"))
    return [file for file in files if file.stat().st_mtime >= start - 1]


def _usage() -> str:
    return USAGE.format(
        models=", ".join(models()),
        tasks=", ".join(local_tasks()),
        options=", ".join((*OPTIONS, *FLAGS)),
        launch=", ".join(LAUNCH),
    )


if __name__ == "__main__":
    sys.exit(main())
