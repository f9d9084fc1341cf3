"""`jaxnorm doctor`: finds each broken checkpoint, says nothing of sound ones, writes a page, answers bad input."""

import re
import shutil
import subprocess

import broken
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxnorm as jn
from jaxnorm.__main__ import main
from jaxnorm.lab import doctor, doctor_options, options
from jaxnorm.lab.datasets import mobilenet_weights

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALONE = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture
def examine(capsys):
    """Runs the command: its exit status and what it printed."""

    def run(*args):
        status = main(["doctor", *map(str, args)])
        return status, capsys.readouterr().out

    return run


def wrong(out):
    return dict(re.findall(r"^wrong  (\S+): (.*)$", out, re.MULTILINE))


@pytest.mark.parametrize("case", broken.BROKEN, ids=lambda case: case.file)
def test_each_broken_checkpoint_is_found(case, tmp_path, examine):
    broken.write(tmp_path / case.file, case.make())
    status, out = examine(tmp_path / case.file, *case.flags)
    found = wrong(out)
    assert set(found) == set(case.norms)
    assert case.said in found[case.norms[0]]
    assert status == 1
    assert re.search(rf"^\d+ norms: {len(case.norms)} wrong, ", out, re.MULTILINE)


@pytest.mark.parametrize("name", broken.SOUND)
def test_of_sound_ones_nothing_is_said(name, tmp_path, examine):
    broken.write(tmp_path / name, broken.SOUND[name]())
    status, out = examine(tmp_path / name)
    assert status == 0
    assert not wrong(out)
    notes = re.findall(r"^note .*$", out, re.MULTILINE)
    assert len(notes) == {"fresh.npz": 3, "pruned.npz": 1}.get(name, 0), notes
    assert out.endswith(f"norms: 0 wrong, {len(notes)} with notes\n")


def test_there_are_ten_of_each():
    assert len(broken.BROKEN) == len({case.said for case in broken.BROKEN}) == 10 <= len(broken.SOUND)


def test_of_a_large_real_network_nothing_is_said(examine):
    try:
        path = mobilenet_weights()
    except options.BadOption as error:
        pytest.skip(str(error))
    status, out = examine(path, "--momentum", "0.9")
    assert status == 0
    assert out.endswith("52 norms: 0 wrong, 10 with notes\n")
    # 72 % of these variances are below epsilon, and the network classifies as well as any
    assert "note   features/17/conv/1/1: 689 of 960 variances are below epsilon = 1e-05 (1 denormal)" in out


def test_steps_that_norms_do_not_count(tmp_path, examine):
    """0.9^3 = 73 %, 0.9^20 = 12 %."""
    broken.write(tmp_path / "net.msgpack", broken.good())
    broken.write(tmp_path / "state.msgpack", broken.with_averages())  # of step 20
    status, out = examine(tmp_path / "net.msgpack", "--momentum", "0.9", "--updates", "3")
    assert status == 1
    assert set(wrong(out)) == set(broken.ALL)
    assert "3 updates, half-life at momentum 0.9 is 7: still 73% of the initial 0 and 1" in wrong(out)["bn_0"]
    status, out = examine(tmp_path / "state.msgpack", "--momentum", "0.9")
    assert status == 0
    assert out.count("20 updates, half-life at momentum 0.9 is 7: still 12% of the initial 0 and 1") == 3
    status, out = examine(tmp_path / "net.msgpack", "--momentum", "0.9")
    assert status == 0
    assert "; momentum needs the number of updates" in out


def test_a_folder_of_a_checkpoint_manager(tmp_path, examine):
    """Its root with one step, the step, and an item that has a name."""
    args = ocp.args
    with ocp.CheckpointManager(tmp_path / "plain") as manager:
        manager.save(10, args=args.StandardSave(broken.good()))
    with ocp.CheckpointManager(tmp_path / "named", item_names=("state", "meta")) as manager:
        manager.save(
            10, args=args.Composite(state=args.StandardSave(broken.diverged()), meta=args.JsonSave({"epoch": 1}))
        )
    for path, worst in (("plain", 0), ("plain/10", 0), ("named", 1), ("named/10", 1), ("named/10/state", 1)):
        status, out = examine(tmp_path / path)
        assert status == worst
        assert len(wrong(out)) == worst


def test_the_table_and_where(tmp_path, examine):
    jn.tools.write(tmp_path / "a.npz", {"bn.mean": np.array([0.5, -3.0]), "bn.var": np.array([0.25, 2.0]),
                                        "ln.weight": np.array([1.0, 2.0]), "ln.bias": np.zeros(2)})  # fmt: skip
    status, out = examine(tmp_path / "a.npz")
    assert status == 0
    assert out.splitlines() == [
        str(tmp_path / "a.npz"),
        "norm  kind            shape  updates  mean max  var min  var max  scale min  grade",
        "----  --------------  -----  -------  --------  -------  -------  ---------  -----",
        "bn    batch           (2,)            3         0.25     2",
        "ln    scale and bias  (2,)                                        1",
        "",
        "2 norms: 0 wrong, 0 with notes",
    ]
    assert examine(tmp_path / "a.npz", "--where", "l*")[1].endswith("1 norm: 0 wrong, 0 with notes\n")
    status, out = examine(tmp_path / "a.npz", "--epsilon", "0.3", "--where", "bn")
    assert status == 0
    assert "note   bn: 1 of 2 variances are below epsilon = 0.3, which sets their gain" in out


# --- the page

EVIL = "<script>document.title='run'</script>$\x1b[2J"


@pytest.fixture
def page(tmp_path, examine):
    """Of a checkpoint in which something is wrong, and a name that wants to be a program: its path and its text."""
    tree = broken.one_layer_in_evaluation_mode()
    tree["params"][EVIL] = tree["params"].pop("norm")
    broken.write(tmp_path / "model.msgpack", tree)
    status, out = examine(tmp_path / "model.msgpack", "--html", tmp_path / "page.html", "--momentum", "0.9")
    assert status == 1
    assert out.endswith(f"\n{tmp_path / 'page.html'}\n")
    assert "\x1b" not in out
    return tmp_path / "page.html"


def chromium(*args):
    done = subprocess.run([CHROMIUM, *ALONE, *map(str, args)], capture_output=True, timeout=60, check=True)
    return done.stdout.decode()


def test_the_page_holds_all_it_shows(page):
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", text)  # SVG refers to its own parts
    assert "bn_1</b><br><span>never updated (mean 0, var 1), where bn_0 and 1 more were</span>" in text
    assert text.index("What is wrong") < text.index("<svg") < text.index("<table>")
    assert "prefers-color-scheme: dark" in text


@needs_chromium
def test_the_page_in_a_browser(page, tmp_path):
    dom = chromium(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{page}")
    assert "<title>model.msgpack: jaxnorm doctor</title>" in dom  # the name of the layer did not run
    assert dom.count("<tr>") == 1 + 4
    assert dom.count('<li class="wrong">') == 1
    assert len(re.findall(r'<g id="axes_\d"', dom)) == 3


@needs_chromium
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_the_page_on_a_phone(scheme, page, tmp_path):
    """What is outside the text is the background of the scheme; a picture that is wide scrolls in itself."""
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    chromium(
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
        "--hide-scrollbars", "--window-size=400,1200", f"--screenshot={shot}", f"file://{page}",
    )  # fmt: skip
    picture = imread(shot)[..., :3]
    assert picture.shape == (1200, 400, 3)
    np.testing.assert_allclose(picture[:, -8:], (0x14 / 255 if scheme == 0 else 1.0), atol=0.05)  # --page
    ink = picture.min() < 0.2 if scheme else picture.max() > 0.8
    assert ink


# --- bad input


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and one line on stderr; the line."""

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", *map(str, args)])
        streams = capsys.readouterr()
        assert stop.value.code == 2
        assert streams.out == ""
        assert streams.err.count("\n") == 1
        return streams.err

    return run


BAD = {
    "no file": (["{}/none.npz"], r"there is no file '.*none.npz'"),
    "no suffix": (["{}/a.txt"], "'a.txt' has none of the suffixes that can be read"),
    "broken file": (["{}/broken.npz"], "'broken.npz' is not a whole .npz file"),
    "no norm": (["{}/kernel.npz"], "argument CHECKPOINT: there is no norm in '.*kernel.npz'"),
    "where": (["{}/good.npz", "--where", "bm"], "where='bm' matches no norm. Did you mean 'bn'"),
    "where empty": (["{}/good.npz", "--where", ","], "--where: names no layer"),
    "momentum": (["{}/good.npz", "--momentum", "2"], "--momentum: must be a number from 0 to 1, got '2'"),
    "momentum nan": (["{}/good.npz", "--momentum", "nan"], "--momentum: must be a number from 0 to 1, got 'nan'"),
    "epsilon": (["{}/good.npz", "--epsilon", "-1"], "--epsilon: must be a number from 0, got '-1'"),
    "epsilon word": (["{}/good.npz", "--epsilon", "small"], "--epsilon: must be a number, got 'small'"),
    "updates": (["{}/good.npz", "--updates", "-1"], "--updates: must be a whole number from 0, got '-1'"),
    "empty": (["{}/empty"], "'empty' cannot be read: no checkpoint of orbax: it holds nothing"),
    "steps": (["{}/steps"], "'steps' cannot be read: it holds 9, 10: name one"),
    "nothing": ([], "the following arguments are required: CHECKPOINT"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, refused, tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    for step in ("10", "9"):
        (tmp_path / "steps" / step / "default").mkdir(parents=True)
        (tmp_path / "steps" / step / "default" / "_METADATA").touch()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    jn.tools.write(tmp_path / "kernel.npz", {"dense.kernel": np.ones((2, 2))})
    jn.tools.write(tmp_path / "good.npz", {"bn.scale": np.ones(2)})
    args, message = BAD[case]
    assert re.search(message, refused(*(arg.format(tmp_path) for arg in args)))


def test_a_page_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    jn.tools.write(tmp_path / "good.npz", {"bn.scale": np.ones(2)})
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(tmp_path / "good.npz"), "--html", str(tmp_path / "none" / "page.html")])
    assert re.search("--html: cannot write to '.*page.html': No such file", capsys.readouterr().err)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(options.BadOption, match=r"needs matplotlib, which is not installed"):
        doctor.run(doctor_options.Options(tmp_path / "good.npz", html=tmp_path / "page.html"))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])
    text = capsys.readouterr().out
    for name in doctor_options.Options.__dataclass_fields__:
        assert name == "checkpoint" or f"--{name}" in text
    assert text.count("\n  jaxnorm doctor") >= 4


def test_every_example_of_the_help_is_accepted(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda options: 0)
    text = doctor_options.DESCRIPTION["epilog"]
    commands = [line.replace('"', "").split() for line in text.splitlines() if line.startswith("  jaxnorm")]
    assert all(main(command[1:]) == 0 for command in commands)
