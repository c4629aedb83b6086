"""The wheel, and a wheel built from the sdist, hold everything and work outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT

pytestmark = pytest.mark.slow
OUTSIDE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
METHODS = sorted(
    name
    for file in (ROOT / "plugins").glob("*/errata_*/registry.yaml")
    for name in yaml.safe_load(file.read_text(encoding="utf-8"))["methods"]
)

SCRIPT = """
import sys, errata
from errata.cli import main
from errata.contract.registry import Registry
from errata.contract import plugins
assert {root!r} not in errata.__file__, errata.__file__
names = {methods!r}
registry = Registry.load()
assert set(registry.methods) == set(plugins.installed()) == set(names)
packages = {{name: point.module for name, point in plugins.installed().items()}}
for name in names:
    plugins.load(name)
    assert {{p.set_by for p in registry.presets(name)}} == {{"plugin " + packages[name]}}
from errata.datasets import atlas
request = atlas.requests(1)[0]
with errata.Editor("atlas-gpt2", artifacts="cache", guards={{"perplexity": "off"}}) as editor:
    before = editor.generate(request.text, max_new_tokens=5)
    edit = editor.edit(request, method="rome")
    assert editor.generate(request.text, max_new_tokens=5) != before
    editor.revert(edit)
    assert editor.generate(request.text, max_new_tokens=5) == before
    assert editor.verify() == []
print("works")
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build sdist and wheel; the wheel is built from the sdist, as `python -m build` does."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


def test_the_wheel_from_the_sdist_is_the_wheel_from_the_checkout(
    archives: tuple[Path, Path], tmp_path: Path
) -> None:
    direct = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    subprocess.run([*direct, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert names(wheel) == names(archives[1])
    content = names(wheel)
    assert "errata/registry.yaml" in content
    assert any(n.endswith("atlas-gpt2/model.safetensors") for n in content)
    for package in (ROOT / "plugins").glob("*/errata_*"):
        assert {f"{package.name}/__init__.py", f"{package.name}/registry.yaml"} <= content
    tracked = (ROOT / "core" / "errata").rglob("*")
    wanted = {
        str(p.relative_to(ROOT / "core")) for p in tracked
        if p.is_file() and "__pycache__" not in p.parts
    }  # fmt: skip
    assert wanted <= content
    # What the parity tests read is in every clone and sdist, and in no wheel.
    golden = {str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "golden").rglob("*.*")}
    with tarfile.open(archives[0]) as archive:
        assert golden <= {name.partition("/")[2] for name in archive.getnames()}
    assert not any("golden" in name for name in content)


def test_it_works_where_only_the_wheel_is_installed(
    archives: tuple[Path, Path], tmp_path: Path
) -> None:
    python = layered_environment(tmp_path / "venv")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(archives[1])], check=True)
    script = SCRIPT.format(root=str(ROOT), methods=METHODS)
    done = subprocess.run(
        [str(python), "-c", script], cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("works\n")


def test_the_third_party_plugin_installs_and_keeps_the_contract(
    archives: tuple[Path, Path], tmp_path: Path
) -> None:
    python = layered_environment(tmp_path / "venv")
    plugin = ROOT / "examples" / "third-party-plugin"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(archives[1])], check=True)
    subprocess.run([*pip, "--no-build-isolation", str(plugin)], check=True)
    listing = subprocess.run(
        [str(python), "-m", "errata", "methods", "constrained-ft"],
        cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "epsilon" in listing.stdout
    done = subprocess.run(
        [str(python), "-m", "pytest", "-p", "no:cacheprovider", str(plugin / "tests")],
        cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def layered_environment(folder: Path) -> Path:
    """Return the Python of a new environment that sees this one's libraries, but not errata.

    Installing torch again would take minutes and prove nothing about errata.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = {"capture_output": True, "text": True, "check": True}
    site = Path(subprocess.run([str(python), "-c", find], **run).stdout.strip())
    outer = Path(subprocess.run([sys.executable, "-c", find], **run).stdout.strip())
    links = site.parent / "libraries"
    links.mkdir()
    for item in outer.iterdir():
        ours = item.name.startswith(("errata", "_errata", "__editable__"))
        if not ours and item.suffix != ".pth":
            (links / item.name).symlink_to(item)
    (site / "libraries.pth").write_text(str(links) + "\n")
    return python
