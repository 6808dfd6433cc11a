"""Experiment trackers beside log.jsonl: TensorBoard, Weights & Biases and MLflow; rank 0 alone.

All get the same numbers under the same names and steps. Nothing leaves this machine unless the
user's environment says so: what is written, and what is not, stands in docs/training.md.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip.settings.config import Config, ConfigError, flatten, to_dict
from mlip.settings.typed_tree import require_utf8
from mlip.system.output_file import whole_file
from mlip.training.tracker_feed import (
    LAST_WAIT_S,
    Feed,
    Kind,
    Point,
    Tracker,
    told,
    without_password,
)

logger = logging.getLogger("mlip")

NAMES = ("tensorboard", "wandb", "mlflow")  # settings of `train`
KEPT = "trackers.json"  # in the run's folder: the names of its runs in W&B and MLflow
PROJECT = "mlip"  # of W&B, and MLflow's experiment, where the environment names none
ROOM_BYTES = 16 << 20  # left on a disk that is as good as full
START_S = 60.0  # for W&B's server at the start; other ranks wait run.timeout_s


class _Board:
    """TensorBoard's files in run.dir/tensorboard."""

    setting, at_once, seen, seen_val = "train.tensorboard", 1, 0, 0

    def __init__(self, config: Config, purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _not_installed(self.setting, "tensorboard") from error
        self._open = functools.partial(SummaryWriter, str(Path(config.run.dir) / "tensorboard"))
        self._writer: Any = self._open(purge_step=purge_step)

    def write(self, points: Sequence[Point]) -> None:
        if self._writer is None:
            self._writer = self._open()
        try:
            for point in points:
                for name, value in point.numbers.items():
                    self._writer.add_scalar(name, value, point.step)
        except Exception:
            self._writer = None  # its thread has ended, on a full disk: it takes nothing any more
            raise

    def close(self, ended: str) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """Weights & Biases: files in run.dir/wandb, sent where WANDB_MODE=online says so.

    `step` is a number of its own, and the axis of the others: `wandb sync` counts the rows of a
    resumed run on from those it has, whatever step they were logged with (seen with 0.31).
    """

    setting, at_once = "train.wandb", 1

    def __init__(self, config: Config, kept: dict[str, Any], mode: str) -> None:
        self._folder = folder = Path(config.run.dir)
        # it would send errors, and counts of its own calls, offline too
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder.absolute() / "wandb" / "cache"))
        try:
            with _own_temporary_folder():
                import wandb
        except ImportError as error:
            raise _not_installed(self.setting, "wandb") from error
        known = kept.get("wandb")
        name = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
        try:
            if mode != "offline" and not wandb.login(prompt=False, verify=True):
                raise ConfigError("no API key: `wandb login`, or set WANDB_API_KEY")
            self._run = wandb.init(
                dir=str(folder),
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or folder.absolute().name,
                id=name,
                resume="allow",
                config=settings_shown(config),
                settings=wandb.Settings(
                    **{"mode": mode, "silent": True, "symlink": False, "init_timeout": START_S},
                    **{"allow_val_change": True, "finish_timeout": LAST_WAIT_S},
                    # one of before that is not finished yet would be given back, and filled
                    reinit="create_new",
                    # a kill -9 takes along what is younger than this
                    x_transaction_log_flush_interval=1.0,
                    # numbers and settings alone: no text of the terminal, no code, no machine
                    **{"console": "off", "save_code": False, "disable_code": True},
                    **{"disable_git": True, "disable_job_creation": True, "label_disable": True},
                    **{"sync_tensorboard": False, "host": "", "program": "", "email": ""},
                    **{"x_disable_meta": True, "x_disable_stats": True},
                    **{"x_disable_machine_info": True, "x_save_requirements": False},
                ),
            )
        except Exception as error:  # of many kinds; its traceback may name a password
            raise _cannot_start(self.setting, f"WANDB_MODE={mode}", error, known) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        kept["wandb"] = name
        self.seen = self.seen_val = 0
        if self._run.resumed:  # the server has told what it has
            self.seen = int(self._run.summary.get("step", 0))
            # of steps and of val together: it may be that of a step which val was not looked at
            self.seen_val = min(self.seen, _highest_step(folder / "validation.jsonl"))
        elif known == name:  # files of earlier starts, which `wandb sync` sends one day
            self.seen = _highest_step(folder / "log.jsonl")
            self.seen_val = _highest_step(folder / "validation.jsonl")

    def write(self, points: Sequence[Point]) -> None:
        # its own process would write half a record, nothing more, and say nothing
        total, _, free = shutil.disk_usage(self._folder)
        if total and free < ROOM_BYTES:  # a program's file system (FUSE) may say 0 of 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for point in points:
            if point.kind == "evaluation":
                self._run.summary.update(point.numbers)
            else:
                self._run.log({**point.numbers, "step": point.step})

    def close(self, ended: str) -> None:
        self._run.finish(exit_code=0 if ended == "trained" else 1)


class _Mlflow:
    """MLflow: run.dir/mlflow.db, or the server that MLFLOW_TRACKING_URI names."""

    setting, at_once = "train.mlflow", 20
    _STATUS = {"trained": "FINISHED", "stopped": "KILLED"}

    def __init__(self, config: Config, kept: dict[str, Any]) -> None:
        folder = Path(config.run.dir).absolute()
        given = os.environ.get("MLFLOW_TRACKING_URI")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # an address may hold a password
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # its own are 7 times 120 s, with the other ranks waiting at the start
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient

            if not given:
                import alembic  # noqa: F401
                import sqlalchemy  # noqa: F401
        except ImportError as error:
            raise _not_installed(self.setting, "mlflow-skinny sqlalchemy alembic") from error
        # it tells of every table it makes, and of each error by a page
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        if not given:
            require_utf8("train.mlflow=true: the path of run.dir", str(folder))
            if {"?", "%"} & set(str(folder)):
                raise ConfigError(
                    f"train.mlflow=true: run.dir={config.run.dir} has ? or % in its path, which "
                    "MLflow's local store cannot name; choose another run.dir"
                )
        self._metric = Metric
        where = without_password(given) if given else "local"
        runs = kept.get("mlflow", {})
        known = os.environ.get("MLFLOW_RUN_ID") or runs.get(where)
        try:
            self._client = MlflowClient(tracking_uri=given or f"sqlite:///{folder}/mlflow.db")
            self._id = self._open_run(folder, known, is_local=not given)
            self._write_params(config)
            self._read_last_steps()
        except Exception as error:  # of many kinds; its traceback may name a password
            raise _cannot_start(self.setting, where, error, known) from None
        kept["mlflow"] = {**runs, where: self._id}

    def _open_run(self, folder: Path, known: str | None, *, is_local: bool) -> str:
        if known is not None:
            if self._client.get_run(known).info.lifecycle_stage == "deleted":
                raise ConfigError(f"run {known} was deleted there")
            self._client.update_run(known, status="RUNNING")
            return known
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            found = self._client.get_experiment_by_name(name)
            # MLflow would name a folder of the working directory; nothing is written there
            place = (folder / "mlflow").as_uri() if is_local else None
            experiment = (
                found.experiment_id
                if found is not None
                else self._client.create_experiment(name, artifact_location=place)
            )
        run = self._client.create_run(experiment, run_name=folder.name)
        return str(run.info.run_id)

    def _write_params(self, config: Config) -> None:
        """Those that are not there yet: MLflow refuses to change one."""
        from mlflow.entities import Param

        there = self._client.get_run(self._id).data.params
        longest, most = 6000, 100  # what its servers take of a value, and at once
        shown = {
            _plain_name(k): str(v)[:longest] for k, v in flatten(settings_shown(config)).items()
        }
        left = [Param(key, value) for key, value in shown.items() if key not in there]
        for begin in range(0, len(left), most):
            self._client.log_batch(self._id, params=left[begin : begin + most])

    def _read_last_steps(self) -> None:
        """Of the latest values, which are those of the highest steps: a history of 200,000 takes
        9 s."""
        latest = self._client.get_run(self._id).data.to_proto().metrics
        steps = {metric.key: int(metric.step) for metric in latest}
        self.seen, self.seen_val = steps.get("total", 0), steps.get("val/total", 0)

    def write(self, points: Sequence[Point]) -> None:
        # the same point, written again after a failure, is one point
        metrics = [
            self._metric(_plain_name(name), value, point.time_ms, point.step)
            for point in points
            for name, value in point.numbers.items()
        ]
        self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def close(self, ended: str) -> None:
        self._client.set_terminated(self._id, self._STATUS.get(ended, "FAILED"))


class Trackers:
    """Those that the settings name, open; none is where they name none.

    start_step  behind which steps follow; None = no step does
    only        these of them
    Raises:     ConfigError where one is not installed, or cannot be opened with these credentials
    """

    def __init__(self, config: Config, start_step: int | None, *only: str) -> None:
        folder = Path(config.run.dir)
        asked = {name for name in only or NAMES if getattr(config.train, name)}
        opened: list[Tracker] = []
        if "tensorboard" in asked:
            # what a killed run wrote after its last checkpoint is written again
            opened.append(_Board(config, None if start_step is None else start_step + 1))
        mode = os.environ.get("WANDB_MODE") or "offline"
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # its own older words
        kept = _read_kept(folder / KEPT) if asked & {"wandb", "mlflow"} else {}
        try:
            if "wandb" in asked and mode != "disabled":
                opened.append(_Wandb(config, kept, mode))
            if "mlflow" in asked:
                opened.append(_Mlflow(config, kept))
        finally:  # one that is open goes on in its run where the other was refused
            if kept:
                _keep(kept, folder / KEPT)
        self._feeds = [Feed(tracker) for tracker in opened]
        for feed in self._feeds:
            if start_step is not None and feed.tracker.seen > start_step:
                logger.info(
                    "%s: it has the steps up to %d already; they are not written to it again",
                    feed.tracker.setting,
                    feed.tracker.seen,
                )
            feed.start()

    def put(self, step: int, numbers: Mapping[str, float], *, kind: Kind = "step") -> None:
        """Returns at once, whatever the trackers do."""
        if self._feeds:
            point = Point(step, dict(numbers), kind, int(time.time() * 1000))
            for feed in self._feeds:
                feed.put(point)

    def close(self, ended: str) -> None:
        """ended  "trained", "stopped" on request, or "failed"; waits LAST_WAIT_S at most"""
        deadline = time.monotonic() + LAST_WAIT_S
        for feed in self._feeds:
            feed.end(ended)
        for feed in self._feeds:
            feed.wait(deadline - time.monotonic())
        self._feeds = []


def put_evaluation(config: Config, step: int, scores: Mapping[str, float]) -> None:
    """Scores of the run's checkpoint of `step`, into the runs that its training wrote and closed.

    Each tracker is opened again. One that cannot be lacks them, and a line says so: nothing ends.
    """
    numbers = {f"evaluation/{score}": value for score, value in scores.items()}
    for name in NAMES:
        try:
            # the best on val may lie before the last step, whose curve stays
            tracker = Trackers(config, None, name)
        except (ConfigError, OSError) as error:  # of TensorBoard, whose folder cannot be written
            logger.warning("the scores of the evaluation are not there: %s", error)
            continue
        tracker.put(step, numbers, kind="evaluation")
        tracker.close("trained")


def settings_shown(config: Config) -> dict[str, Any]:
    """The settings, resolved, with the last name of each path alone: folders tell of places."""
    shown: dict[str, Any] = _without_places(to_dict(config))
    return shown


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rpartition("/")[2]
    return value


def _plain_name(name: str) -> str:
    """A name that MLflow takes: it has no @, as in "recall@10"."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """For what an import puts there: two folders of W&B's would stay, as `leave` removes none."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as own:
        try:
            tempfile.tempdir = own
            yield
        finally:
            tempfile.tempdir = before


def _highest_step(path: Path) -> int:
    """Of a file of lines that begin with their step; half a GB takes about a second."""
    most = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                found = re.match(rb'\{"step": (\d+)', line)
                most = max(most, int(found[1]) if found else 0)
    return most


def _read_kept(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and isinstance(kept.get("mlflow", {}), dict):
            return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    raise ConfigError(
        f"{path}: expected the names of this run's runs in W&B and MLflow, as JSON; remove it to "
        "begin new ones there"
    )


def _keep(kept: Mapping[str, Any], path: Path) -> None:
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; make room or choose another run.dir"
        ) from error


def _not_installed(setting: str, packages: str) -> ConfigError:
    return ConfigError(
        f"{setting}=true needs {packages}, of which something is not installed: pip install "
        f"{packages}, or leave the setting out (log.jsonl is always written)"
    )


def _cannot_start(setting: str, where: str, error: Exception, known: str | None) -> ConfigError:
    anew = f", or remove {KEPT} of the run's folder to begin a new run there" if known else ""
    return ConfigError(
        f"{setting}=true ({where}) cannot start: {told(error)}; mend it, leave the setting out "
        f"(log.jsonl is always written){anew}"
    )
