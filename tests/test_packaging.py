"""What is installed is what is in the tree: the wheel holds the two linked folders, once."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (
    "import mlip.settings.config, mlip.kernels.info_nce, mlip.kernels.token_knowledge_patch, "
    "mlip.dataloading.manifest, mlip.knowledge.linker; print(mlip.kernels.info_nce.__file__)"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks, so that leftovers of builds cannot hide."""
    source = tmp_path_factory.mktemp("tracked") / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the tracked files are not known")
    for name in listed.stdout.decode().split("\0"):
        file = ROOT / name
        if not name or not (file.is_file() or file.is_symlink()):
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            target.symlink_to(file.readlink())
        else:
            target.write_bytes(file.read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_not_named_after_another_project(wheel: Path) -> None:
    assert wheel.name.startswith("mlip_medical-")


def test_the_wheel_holds_every_module_once_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    listed = subprocess.run(
        ["git", "ls-files", "mlip/*.py", "kernels/*.py", "dataloading/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tracked = [name for name in listed.stdout.split() if (ROOT / name).is_file()]
    expected = {name if name.startswith("mlip/") else f"mlip/{name}" for name in tracked}
    assert len(expected) > 60
    assert expected <= set(names)
    assert any(name.startswith("mlip/knowledge/lexicon/") for name in names)
    assert any(name.startswith("mlip/pages/templates/") for name in names)
    assert "mlip/py.typed" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_on_arm_the_extra_for_gpus_asks_for_no_xformers(wheel: Path) -> None:
    """It has wheels for x86_64 alone: pip would compile it, which ends in an error without nvcc."""
    with zipfile.ZipFile(wheel) as made:
        (name,) = [name for name in made.namelist() if name.endswith("/METADATA")]
        lines = made.read(name).decode().splitlines()
    asked = [Requirement(x[15:]) for x in lines if x.startswith("Requires-Dist: ")]

    def of_gpu(machine: str) -> set[str]:
        here = {"extra": "gpu", "platform_machine": machine}
        return {one.name for one in asked if one.marker and one.marker.evaluate(here)}

    assert of_gpu("aarch64") == {"deepspeed", "nvidia-dali-cuda130"}
    assert of_gpu("x86_64") == of_gpu("aarch64") | {"xformers"}


# the metadata of torch's build for CUDA, the one on PyPI, asks for exactly this Triton
TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.13.0": "3.7.1"}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_set_asks_for_the_triton_that_its_torch_asks_for(name: str) -> None:
    """pip finds no solution otherwise, and the README's first command ends there; an index with
    torch's CPU build, which asks for none, hides that."""
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    needed = TRITON_OF_TORCH[pins["torch"]]
    assert pins.get("triton", needed) == needed


def test_an_sdist_holds_what_a_wheel_is_built_from(source: Path, wheel: Path) -> None:
    """Half of the tests, without what they import, would fail for whoever runs them."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(wheel.parent)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (made,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    for name in zipfile.ZipFile(wheel).namelist():
        if ".dist-info/" not in name:
            plain = name.removeprefix("mlip/")
            linked = plain.startswith(("kernels/", "dataloading/"))
            assert (plain if linked else name) in names


def test_an_installed_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); {IMPORTS}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout


def test_an_installed_wheel_says_what_every_setting_does(wheel: Path, tmp_path: Path) -> None:
    """The words are read from the source that is installed."""
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); from mlip.cli import main; "
        "sys.exit(main(['settings', 'data.crop_px', 'loss.matching', 'transfer.columns.mask']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for words in ("side of the square", "cross-attention layers of the judge", "run lengths, or"):
        assert words in done.stdout


FIND = (
    "import sys\n"
    # an editable install answers through finders of its own: without them only the path counts
    "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)] if {0} else "
    "sys.meta_path\n"
    "from importlib.util import find_spec\n"
    "for name in ('mlip.kernels.info_nce', 'mlip.dataloading.manifest', 'mlip.settings.config'):\n"
    "    print(find_spec(name).origin)\n"
    "sys.exit(sum(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules))\n"
)


def _found(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_checkout_runs_from_its_root_without_being_installed() -> None:
    found = _found(FIND.format(True), ROOT).split()
    assert [Path(path).relative_to(ROOT / "mlip").parts[0] for path in found] == [
        "kernels",
        "dataloading",
        "settings",
    ]


def test_an_editable_install_imports_from_elsewhere(tmp_path: Path) -> None:
    # build leftovers beside setup.py carry the name too, without saying how it was installed
    told = "".join(d.read_text("direct_url.json") or "" for d in distributions(name="mlip-medical"))
    if '"editable": true' not in told:
        pytest.skip("mlip-medical is not installed in editable mode here (make setup does that)")
    assert all(
        Path(path).resolve().is_relative_to(ROOT)
        for path in _found(FIND.format(False), tmp_path).split()
    )


@pytest.mark.parametrize("folder", ["kernels", "dataloading"])
def test_the_two_linked_folders_are_no_packages_of_their_own(folder: str) -> None:
    # with an __init__.py they would shadow other projects' `kernels` and `dataloading`
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "mlip" / folder).readlink() == Path("..") / folder


def test_core_imports_need_no_torchvision_deepspeed_or_dali() -> None:
    code = (
        "import sys\n"
        "for name in ('torchvision', 'timm', 'deepspeed', 'nvidia.dali', 'xformers'):\n"
        "    sys.modules[name] = None\n"
        "import mlip.assembly, mlip.objective, mlip.training.engine, mlip.dataloading.loader\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
