"""The release: portable libraries, checks of a wheel, and the workflow."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "cmake"), str(ROOT / "tools")]
import check_wheel  # noqa: E402
import glibc_stubs  # noqa: E402

LIBC = """
0000000000085500 g    DF .text  0000000000000090 (GLIBC_2.2.5) dlopen
0000000000085500 g    DF .text  0000000000000090  GLIBC_2.34  dlopen
0000000000085560 g    DF .text  0000000000000090 (GLIBC_2.3.4) dlmopen
0000000000085560 g    DF .text  0000000000000090  GLIBC_2.34  dlmopen
00000000000a0000 g    DF .text  0000000000000010 (GLIBC_2.2.5) pthread_cond_init
00000000000a0010 g    DF .text  0000000000000010  GLIBC_2.3.2 pthread_cond_init
00000000000f7800  w   DF .text  0000000000000034  GLIBC_2.33  fstat64
00000000000f8000 g    DF .text  0000000000000034  GLIBC_2.34  pthread_new
"""


def build(folder, *options, code="int pbs_f() { return 0; }", name="libpbs.so"):
    """A shared library of C code."""
    (folder / "source.c").write_text(code)
    command = ["cc", "-shared", "-fPIC", "-s", folder / "source.c", "-o", folder / name, *options]
    subprocess.run(command, check=True)
    return folder / name


def test_functions_that_moved_keep_their_old_version():
    """Other functions have the same meaning only under one version, or had another meaning
    before."""
    assert glibc_stubs.moved_functions(LIBC) == {"dlopen": "2.2.5", "dlmopen": "2.3.4"}


def test_stubs_bind_to_old_versions(tmp_path, capsys):
    glibc_stubs.main("c++", tmp_path / "stubs")
    stubs = capsys.readouterr().out.split()
    if not stubs:
        pytest.skip("this glibc is older than 2.34: nothing has moved")
    code = """
    #include <dlfcn.h>
    #include <pthread.h>
    void* pbs_open() { return dlopen("nowhere.so", RTLD_LAZY); }
    void* pbs_key() { pthread_key_t key; pthread_key_create(&key, 0); return dlsym(0, "x"); }
    """
    new = check_wheel.printed("objdump", "-T", build(tmp_path, code=code, name="new.so"))
    old = build(tmp_path, "-Wl,--as-needed", *stubs, code=code)
    assert "GLIBC_2.34" in new and "GLIBC_2.34" not in check_wheel.printed("objdump", "-T", old)
    needed = check_wheel.printed("readelf", "-d", old)
    assert "[libdl.so.2]" in needed and "[libpthread.so.0]" in needed
    assert "librt" not in needed
    # The system's own libraries of these names satisfy it.
    opened = f"import ctypes; print(ctypes.CDLL('{old}').pbs_open())"
    assert check_wheel.printed(sys.executable, "-c", opened) == "0\n"


@pytest.fixture
def make_wheel(tmp_path):
    """Makes a wheel that is correct except for these changes: options of the linker, code, files by
    name."""
    build(tmp_path, "-Wl,-soname,libtorch_cpu.so", code="int t;", name="libtorch_cpu.so")

    def make(*options, code="extern int t; int pbs_f() { return t; }", name=None, files=None):
        library = build(tmp_path, tmp_path / "libtorch_cpu.so", *options, code=code)
        contents = {"pbs_attn/py.typed": "", "pbs_attn/data/persuasion.txt": ""}
        contents |= {"_pbs_attn_cli.py": "", "pbs_attn-1.0.dist-info/METADATA": ""} | (files or {})
        path = tmp_path / (name or "pbs_attn-1.0-py3-none-manylinux_2_28_x86_64.whl")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(library, "pbs_attn/libpbs.so")
            for file, text in contents.items():
                if text is not None:
                    archive.writestr(file, text)
        return path

    return make


def findings(wheel):
    return check_wheel.findings(wheel, "manylinux_2_28_x86_64", ["/root", "/tmp/build.x"])


def test_a_right_wheel(make_wheel):
    assert findings(make_wheel(files={"pbs_attn/a.py": "/rooted /a/root/b"})) == []


@pytest.mark.parametrize(
    "change, finding",
    [
        ({"name": "pbs_attn-1.0-py3-none-linux_x86_64.whl"}, "the name must be pbs_attn-<version>"),
        ({"files": {"pbs_attn/py.typed": None}}, "the wheel must have pbs_attn/py.typed"),
        ({"files": {"tests/a.py": ""}}, "the wheel must not have tests/a.py"),
        ({"files": {"pbs_attn.libs/libtorch.so": ""}}, "must not have pbs_attn.libs/libtorch.so"),
        (
            {"files": {"pbs_attn/a.py": "x = '/root/a.py'"}},
            "pbs_attn/a.py must not name a folder of the build machine, got /root",
        ),
        (
            {"code": 'extern int t; const char* pbs_f() { return t ? 0 : "/tmp/build.x/a.h"; }'},
            "pbs_attn/libpbs.so must not name a folder of the build machine, got /tmp/build.x",
        ),
        ({"options": ["-Wl,-rpath,/opt"]}, "the library must have neither RPATH nor RUNPATH"),
        ({"code": "extern int t; int f() { return t; }"}, "the library must not export f"),
        ({"code": "int pbs_f() { return 0; }", "options": ["-Wl,--as-needed"]}, "must need libtor"),
        ({"options": ["-Wl,--no-as-needed", "-l:libresolv.so.2"]}, "must not need libresolv.so.2"),
    ],
)
def test_a_wrong_wheel(make_wheel, change, finding):
    options = change.get("options", [])
    found = findings(make_wheel(*options, **{k: v for k, v in change.items() if k != "options"}))
    assert len(found) == 1 and finding in found[0]


def test_a_large_wheel(make_wheel, monkeypatch):
    monkeypatch.setattr(check_wheel, "MOST_BYTES", 1000)
    (found,) = findings(make_wheel())
    assert found.startswith("the size must be at most 1000 bytes, got ")


def test_build_requirements_are_those_of_the_project():
    listed = check_wheel.build_requirements(ROOT / "pyproject.toml")
    assert listed[0].startswith("setuptools") and listed[-1].startswith("torch==")


def test_workflow_calls_the_script():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    jobs = workflow["jobs"]
    assert [jobs[job].get("needs") for job in jobs] == [None, "build", "try"]
    for job in ("build", "try"):
        commands = [step.get("run", "") for step in jobs[job]["steps"]]
        assert any(f"tools/release.sh {job}" in command for command in commands)
        assert "manylinux_2_28" in jobs[job]["container"]
    script = (ROOT / "tools" / "release.sh").read_text()
    page = " ".join((ROOT / "docs" / "install.md").read_text().split())
    matrix = jobs["try"]["strategy"]["matrix"]
    assert "Python 3.10, 3.11, 3.12 and 3.13" in page and "2.10, 2.11, 2.13 and the newest" in page
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert matrix["torch"] == ["2.10.0", "2.11.0", "2.13.0", "newest"]
    subprocess.run(["bash", "-n", ROOT / "tools" / "release.sh"], check=True)
    (pairs,) = re.findall(r"^PAIRS=\((.*)\)", script, re.MULTILINE)
    tried = [pair.split(":") for pair in pairs.split()]
    assert [python for python, _ in tried] == matrix["python"]
    assert [torch for _, torch in tried] == matrix["torch"]


def test_pictures_of_the_readme_show_everywhere():
    """The page of a package cannot show files of the repository."""
    project = (ROOT / "pyproject.toml").read_text()
    (repository,) = re.findall(r'^Repository = "(.*)"$', project, re.MULTILINE)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())
    assert pictures
    for picture in pictures:
        start = f"{repository}/raw/main/"
        assert picture.startswith(start) and (ROOT / picture.removeprefix(start)).is_file()
    for link in re.findall(rf"{repository}/blob/main/(.*?)\"", project):
        assert (ROOT / link).is_file()
