"""Claims: one living holder at a time, none for ever, whatever the clocks say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from depthkit.data import claims as claims_module
from depthkit.data.claims import Claims

TIMEOUT = 60.0


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(claims_module.time, "monotonic", clock)
    return clock


def elsewhere(folder: Path, name: str) -> Path:
    """The claim of a process on another machine, of which nothing but its file can be seen."""
    claims = Claims(folder, timeout=TIMEOUT)
    assert claims.take(name) == ""
    path = next(folder.glob(f"{name}.*"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
    return path


def test_only_one_process_has_a_name(tmp_path: Path):
    first, second = Claims(tmp_path, timeout=TIMEOUT), Claims(tmp_path, timeout=TIMEOUT)
    assert first.take("a.tar") == ""
    assert second.take("a.tar") is None
    assert second.take("b.tar") == ""
    assert first.taken() == second.taken() == {"a.tar", "b.tar"}
    first.release("a.tar")
    assert second.take("a.tar") == ""
    second.release("a.tar")
    second.release("b.tar")
    assert not list(tmp_path.iterdir())


def test_names_may_be_paths(tmp_path: Path):
    claims = Claims(tmp_path / "claims", timeout=TIMEOUT)
    claims.take("a/b/c-0.1.tar")
    assert claims.taken() == {"a/b/c-0.1.tar"}
    assert len(list((tmp_path / "claims").iterdir())) == 1


def test_the_end_of_the_block_releases_what_is_held(tmp_path: Path):
    with Claims(tmp_path, timeout=TIMEOUT) as claims:
        claims.take("a.tar")
    assert not list(tmp_path.iterdir())


def test_a_silent_claim_is_taken_over_once_and_names_the_dead(tmp_path: Path, clock: Clock):
    path = elsewhere(tmp_path, "a.tar")
    token = json.loads(path.read_text())["token"]
    first, second = Claims(tmp_path, timeout=TIMEOUT), Claims(tmp_path, timeout=TIMEOUT)
    for claims in (first, second):
        assert claims.take("a.tar") is None
    clock.now += TIMEOUT + 1
    assert first.taken() == set()
    assert first.take("a.tar") == token
    assert second.take("a.tar") is None, "the new claim is not the silent one"
    assert first.taken() == {"a.tar"}
    assert not path.exists()


def test_a_claim_that_gives_signs_of_life_is_never_taken_over(tmp_path: Path, clock: Clock):
    path = elsewhere(tmp_path, "a.tar")
    claims = Claims(tmp_path, timeout=TIMEOUT)
    for beat in range(10):
        assert claims.take("a.tar") is None
        clock.now += TIMEOUT - 1
        os.utime(path, (beat, beat))


@pytest.mark.parametrize("jump", [-1e6, 1e6], ids=["back", "ahead"])
def test_clocks_that_jump_or_differ_change_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, jump: float
):
    path = elsewhere(tmp_path, "a.tar")
    claims = Claims(tmp_path, timeout=TIMEOUT)
    assert claims.take("a.tar") is None
    wrong = time.time() + jump
    os.utime(path, (wrong, wrong))  # the file server's clock
    monkeypatch.setattr(claims_module.time, "time", lambda: wrong)  # and ours
    assert claims.take("a.tar") is None
    clock.now += TIMEOUT - 1
    assert claims.take("a.tar") is None
    clock.now += 2
    assert claims.take("a.tar") is not None, "silence is still noticed"


def test_the_thread_gives_signs_of_life(tmp_path: Path):
    with Claims(tmp_path, timeout=0.3) as claims:
        claims.take("a.tar")
        (path,) = tmp_path.iterdir()
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_two_that_take_over_at_the_same_moment(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """The second one saw the silent claim before the first one took it."""
    elsewhere(tmp_path, "a.tar")
    first, second = Claims(tmp_path, timeout=TIMEOUT), Claims(tmp_path, timeout=TIMEOUT)
    assert [claims.take("a.tar") for claims in (first, second)] == [None, None]
    clock.now += TIMEOUT + 1
    seen = second._newest()
    assert first.take("a.tar")
    monkeypatch.setattr(second, "_newest", lambda: seen)
    assert second.take("a.tar") is None
    assert first.taken() == {"a.tar"}


def test_a_holder_that_comes_back_does_not_release_the_claim_of_its_heir(tmp_path: Path, clock: Clock):
    paused = Claims(tmp_path, timeout=TIMEOUT)
    paused.take("a.tar")
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
    heir = Claims(tmp_path, timeout=TIMEOUT)
    assert heir.take("a.tar") is None
    clock.now += TIMEOUT + 1
    assert heir.take("a.tar") == paused.token
    paused.release("a.tar")
    assert Claims(tmp_path, timeout=TIMEOUT).take("a.tar") is None


Holder = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """`holder()` starts a process that claims a.tar and sleeps."""
    code = "import sys, time; from pathlib import Path; from depthkit.data.claims import Claims\n"
    code += f"Claims(Path(sys.argv[1]), timeout={TIMEOUT}).take('a.tar'); print('holds', flush=True); time.sleep(600)"
    with ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
            return process

        yield start


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing says when a process was started")
def test_a_process_that_was_killed_here_is_known_at_once(tmp_path: Path, holder: Holder):
    claims = Claims(tmp_path, timeout=TIMEOUT)
    process = holder()
    assert claims.take("a.tar") is None
    process.kill()
    while claims.taken():  # a zombie, as long as nobody asked for its end, is dead too
        time.sleep(0.01)
    assert claims.take("a.tar")
    process.wait()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": 1}', b'{"host": null, "pid": "x", "started": null}'])
def test_a_claim_that_says_nothing_lives_until_it_is_silent(tmp_path: Path, clock: Clock, content: bytes):
    """Its maker may be about to write it."""
    (tmp_path / "a.tar.0").write_bytes(content)
    claims = Claims(tmp_path, timeout=TIMEOUT)
    assert claims.take("a.tar") is None
    clock.now += TIMEOUT + 1
    assert claims.take("a.tar") is not None


def test_a_number_that_another_process_got_is_not_the_holder(tmp_path: Path):
    claims = Claims(tmp_path, timeout=TIMEOUT)
    claims.take("a.tar")
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": "12"}))
    assert Claims(tmp_path, timeout=TIMEOUT).take("a.tar") == claims.token
