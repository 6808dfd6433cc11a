"""The Dockerfile against the project: all that it names is there, and all that is needed goes in.

No container is started here; docs/container.md tells what was run in one.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8")).splitlines()
STEPS = [tuple(line.split(None, 1)) for line in LINES if line and not line.startswith("#")]
SETS = ("cpu", "gpu")


def _of(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def _makes(name: str) -> str:
    found = re.search(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_that_of_make_setup_without_what_only_its_developers_need(name: str) -> None:
    extras = [one for one in _makes(f"EXTRAS_{name}").split(",") if one not in ("dev", "docs")]
    assert f'"{name} {_makes(f"OF_{name}")}") extras={",".join(extras)} ;;' in "\n".join(LINES)
    assert f"{name} needs PYTHON={_makes(f'OF_{name}')}".replace("gpu needs", "gpu") in "\n".join(
        LINES
    )
    assert (ROOT / "constraints" / f"{name}.txt").is_file()
    asked = (ROOT / "setup.py").read_text("utf-8").split("extras_require={")[1]
    assert all(f'"{extra}": [' in asked for extra in extras)


def _goes_in(name: str) -> bool:
    """Whether .dockerignore lets a file in: the last pattern that fits it, or a folder above it."""
    rules = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    goes_in = True
    for rule in (line for line in rules if line and not line.startswith("#")):
        pattern = rule.removeprefix("!")
        parts = Path(name).parts
        above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            fits = any(fnmatch.fnmatch(one, pattern) and "/" not in one for one in above)
        if fits:
            goes_in = rule.startswith("!")
    return goes_in


def test_all_that_is_installed_or_copied_goes_in_and_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the tracked files are not known")
    tracked = listed.stdout.splitlines()
    taken = {name for name in tracked if _goes_in(name)}
    tops = {"mlip", "kernels", "dataloading", "configs", "constraints"}
    files = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "train.py"}
    assert taken == {name for name in tracked if name in files or name.split("/")[0] in tops}
    assert {"mlip/kernels", "mlip/dataloading"} <= taken  # the links
    for secret in (
        ".git/config",
        ".env",
        "runs/x/config.yaml",
        "data/film.dcm",
        ".venv/pyvenv.cfg",
    ):
        assert not _goes_in(secret)
    assert not _goes_in("mlip/__pycache__/cli.cpython-311.pyc")
    for step in _of("COPY"):
        if not step.startswith("--from"):
            sources = step.split()[:-1]
            assert all((ROOT / one).exists() and (one == "." or _goes_in(one)) for one in sources)


def test_what_it_starts_is_there() -> None:
    entry = json.loads(_of("ENTRYPOINT")[0])
    assert entry[0].startswith("/opt/venv/bin/") and entry[1:3] == ["-P", "-m"]
    assert importlib.util.find_spec(entry[3]) is not None
    assert (
        json.loads(_of("CMD")[0])[0]
        in (ROOT / "setup.py").read_text("utf-8").split("console_scripts")[1]
    )


def test_no_index_and_no_key_reaches_the_last_stage() -> None:
    """`docker history` shows the build arguments of the last stage to whoever has the image."""
    last = STEPS[max(i for i, (name, _) in enumerate(STEPS) if name == "FROM") :]
    assert not [rest for name, rest in last if name == "ARG" and rest.startswith("PIP_")]
    assert not re.search(r"https?://|index-url|trusted-host", "\n".join(LINES))
    assert [name for name, rest in last if name == "USER"] == ["USER"]  # never as root
    assert "UID=1000" in [rest for name, rest in last if name == "ARG"]


def test_another_commit_or_user_is_not_taken_from_the_cache_of_an_earlier_build() -> None:
    """buildah 1.28 compares arguments at RUN alone: the steps behind the first RUN are made anew.

    Without it an image said the commit of the build before.
    """
    names = [(name, rest.split("=")[0]) for name, rest in STEPS]
    last = names[max(i for i, (name, _) in enumerate(names) if name == "FROM") :]
    made = max(i for i, (name, _) in enumerate(last) if name == "RUN")
    for argument in ("SET", "COMMIT", "UID"):
        assert last.index(("ARG", argument)) < made
    assert min(i for i, (name, _) in enumerate(last) if name in ("ENV", "LABEL", "USER")) > made


@pytest.mark.parametrize("name", ["HOME", "USER", "MLIP_COMMIT"])
def test_a_user_id_without_a_name_has_a_place_for_caches_and_the_commit_is_told(name: str) -> None:
    assert re.search(rf"\b{name}=", _of("ENV")[0])


def test_make_image_tells_it_the_set_the_python_and_the_commit() -> None:
    for name in SETS:
        told = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "image", f"SET={name}", "BUILDER=podman"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        given = dict(re.findall(r"--build-arg (\w+)=(\S*)", told))
        assert told.startswith("podman build") and f"--tag mlip:{name} ." in told
        assert given["SET"] == name and given["PYTHON"] == _makes(f"OF_{name}")
        assert set(given) <= {rest.split("=")[0] for rest in _of("ARG")}
        if (ROOT / ".git").exists():
            assert re.fullmatch(r"[0-9a-f]{12}\+?", given["COMMIT"])
