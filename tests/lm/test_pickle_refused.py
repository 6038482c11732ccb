"""Files that run code when they are read are refused wherever a model, an adapter, a checkpoint or rows are read."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import V, write_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from lm_trust.errors import UserError
from lm_trust.lm import loading
from lm_trust.lm.classifier_reward import load_classifier
from lm_trust.lm.embeddings import load_embedder
from lm_trust.lm.loading import load_adapter, load_base, load_policy
from lm_trust.lm.merging import merge_adapter
from lm_trust.lm.rows import read_rows
from lm_trust.lm.saving import load_trained, save_adapter, save_trained
from lm_trust.training.checkpoint import load_checkpoint, save_checkpoint
from lm_trust.training.config_rewards import ClassifierReward

PICKLE = "a pickle file, which may run code when it is read"


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def mark(tmp_path):
    """A folder that must not be there at the end."""
    yield tmp_path / "pwned"
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def adapter(models, tmp_path):
    policy = load_policy(str(models), r=2)
    save_adapter(policy, tmp_path / "adapter")
    return tmp_path / "adapter"


def spoil(folder, mark, *, honest=False):
    """Its weights as the older libraries would have written them: the same, or with an attack in them."""
    for file in folder.glob("*.safetensors"):
        name = {"model": "pytorch_model", "adapter_model": "adapter_model"}[file.stem]
        weights = load_file(file)
        file.unlink()
        with (folder / f"{name}.bin").open("wb") as target:
            if honest:
                torch.save(weights, target)
            else:
                pickle.dump({"weights": Attack(mark)}, target)
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated", "ignore:Unexpected keyword")
honesty = pytest.mark.parametrize("honest", [False, True], ids=["attack", "honest"])


@honesty
def test_a_language_model(models, tmp_path, mark, honest):
    folder = spoil(Path(shutil.copytree(models, tmp_path / "model")), mark, honest=honest)
    with pytest.raises(UserError, match=rf"^model.path: {folder} holds its weights in pytorch_model.bin, {PICKLE}"):
        load_base(str(folder))
    with pytest.raises(UserError, match=PICKLE):
        load_embedder(str(folder), key="rewards[0].embedder", device="cpu")


@honesty
def test_an_adapter(models, adapter, tmp_path, mark, honest):
    folder = spoil(adapter, mark, honest=honest)
    with pytest.raises(UserError, match=rf"adapter_model.bin, {PICKLE}"):
        load_adapter(load_base(str(models)), folder)
    with pytest.raises(UserError, match=PICKLE):
        load_trained(load_policy(str(models), r=2), folder)
    with pytest.raises(UserError, match=PICKLE):
        merge_adapter(str(models), folder, tmp_path / "merged")


def test_an_adapter_on_the_hub(models, adapter, tmp_path, mark, monkeypatch):
    """Only its two files are fetched, and no other is read."""
    asked = []

    def snapshot(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(adapter)

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", snapshot)
    load_adapter(load_base(str(models)), "someone/adapter")
    assert asked == [("someone/adapter", ["adapter_config.json", "adapter_model.safetensors"])]
    spoil(adapter, mark)
    with pytest.raises(UserError, match=PICKLE):
        load_adapter(load_base(str(models)), "someone/adapter")


@honesty
def test_a_trained_model(models, tmp_path, mark, honest):
    from lm_trust.lm.loading import load_tokenizer

    policy = load_policy(str(models), r=None)
    save_trained(policy, load_tokenizer(str(models)), tmp_path)
    spoil(tmp_path / "model", mark, honest=honest)
    with pytest.raises(UserError, match=PICKLE):
        load_trained(policy, tmp_path / "model")


@honesty
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_classifier(models, tmp_path, mark, honest, kind):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=V, num_labels=1, pad_token_id=0, **shape))
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=1, modules_to_save=["score"]))
    model.save_pretrained(tmp_path / "judge")
    spoil(tmp_path / "judge", mark, honest=honest)
    section = ClassifierReward(path=str(tmp_path / "judge"))
    with pytest.raises(UserError, match=rf"^rewards\[0\]\.path: .*{PICKLE}"):
        load_classifier(section, key="rewards[0]", device="cpu")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors", "/outside.safetensors"])
def test_an_index_that_leads_elsewhere(models, tmp_path, mark, name):
    folder = Path(shutil.copytree(models, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_base(str(folder))
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not a safetensors file beside it"):
        load_base(str(folder))
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(UserError, match="is not an index of weights"):
        load_base(str(folder))


def test_an_index_on_the_hub_that_names_a_pickle(models, tmp_path, mark, monkeypatch):
    """As the hub's cache holds a repository."""
    place = tmp_path / "hub" / "models--someone--tiny"
    folder = Path(shutil.copytree(models, place / "snapshots" / ("a" * 40)))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    program = (
        "import sys\nfrom lm_trust.lm.loading import load_base\nfrom lm_trust.errors import UserError\n"
        "try:\n    load_base('someone/tiny')\nexcept UserError as error:\n    sys.exit(str(error))\n"
    )

    def load():
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)

    assert load().returncode == 0
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    found = load()
    assert found.returncode and "'someone/tiny'" in found.stderr and "safetensors" in found.stderr
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load()
    assert found.returncode and "names 'pytorch_model.bin', which is not a safetensors file" in found.stderr


def test_a_checkpoint(tmp_path, mark, caplog):
    """A pickle in the place of its tensors, or beside them, also under a manifest that says it belongs there."""
    from lm_trust.verified_folder import build_verified

    def build(folder):
        (folder / "state.json").write_text('{"items": []}')
        (folder / "tensors.safetensors").write_bytes(pickle.dumps(Attack(mark)))

    build_verified(tmp_path / "00000001", build)
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)
    assert "00000001: it cannot be read (SafetensorError)" in caplog.text
    save_checkpoint(tmp_path, {"iteration": 2}, iteration=2, keep_last=1)
    (tmp_path / "00000002" / "optimizer.pt").write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)
    assert "optimizer.pt was not put there by lm_trust" in caplog.text


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".pickle", ".npy", ".joblib"])
def test_rows(tmp_path, mark, suffix):
    path = tmp_path / "data" / f"rows{suffix}"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(UserError, match="rows are read from"):
        list(read_rows(path))
    with pytest.raises(UserError, match="not a dataset folder"):
        list(read_rows(path.parent))


def test_a_script_in_a_folder_of_rows_is_not_run(tmp_path, mark):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    with pytest.raises(UserError, match="not a dataset folder"):
        list(read_rows(folder))
    (folder / "data.py").rename(folder / "other.py")
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert [row for _, row in read_rows(folder)] == [{"prompt": "a"}]


# ---- nothing is written elsewhere


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_in_a_folder_of_rows_cannot_write_elsewhere(tmp_path, kind):
    folder = tmp_path / "in" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "row.jsonl").write_text('{"prompt": "a"}\n')
    names = ["../../out.jsonl", f"{tmp_path}/absolute.jsonl", "inside.jsonl"]
    if kind == "tar":
        with tarfile.open(folder / "rows.tar", "w") as archive:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            archive.addfile(link)
            for name in (*names, "link/linked.jsonl"):
                archive.add(tmp_path / "row.jsonl", name)
    else:
        with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
            for name in names:
                archive.write(tmp_path / "row.jsonl", name)
    before = files_below(tmp_path)
    try:
        list(read_rows(folder))
    except UserError as error:
        assert "not a dataset folder" in str(error)
    assert files_below(tmp_path) == before


def test_a_checkpoint_that_is_a_link_or_names_files_elsewhere_is_passed_over(tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoints"
    save_checkpoint(folder, {"iteration": 1, "tensor": torch.ones(2)}, iteration=1, keep_last=9)
    save_checkpoint(folder, {"iteration": 2, "tensor": torch.ones(2)}, iteration=2, keep_last=9)
    moved = tmp_path / "elsewhere.safetensors"
    (folder / "00000002" / "tensors.safetensors").rename(moved)
    (folder / "00000002" / "tensors.safetensors").symlink_to(moved)
    assert load_checkpoint(folder)["iteration"] == 1
    assert "tensors.safetensors is not a plain file" in caplog.text
    manifest = folder / "00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tensors.safetensors", "../../../elsewhere.safetensors"))
    assert load_checkpoint(folder)["iteration"] == 1


def test_a_checkpoint_that_is_a_link_is_not_followed_when_it_is_dropped(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    save_checkpoint(tmp_path / "other", {"iteration": 1}, iteration=1, keep_last=1)
    folder.mkdir(parents=True)
    (folder / "00000001").symlink_to(tmp_path / "other" / "00000001")
    save_checkpoint(folder, {"iteration": 2}, iteration=2, keep_last=1)
    assert load_checkpoint(tmp_path / "other")["iteration"] == 1


def test_names_inside_an_adapter_lead_nowhere(models, adapter, tmp_path):
    """An adapter's keys and configuration hold paths; what is loaded from it is written back below its new folder."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({**weights, "../../escaped.lora_A.weight": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "../../escaped", "revision": "../escaped"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    policy = load_policy(str(models), adapter=adapter)
    before = files_below(tmp_path)
    save_adapter(policy, tmp_path / "run")
    assert {*files_below(tmp_path)} - {*before} == {"run", *(f"run/{name}" for name in files_below(tmp_path / "run"))}


def test_an_adapter_cannot_have_a_module_imported(models, adapter, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for planted in (
        {"megatron_config": {"a": 1}, "megatron_core": "planted"},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "planted"}},
        {"auto_map": {"AutoConfig": "planted.A"}},
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | planted))
        try:
            load_policy(str(models), adapter=adapter)
        except UserError:
            continue


def test_a_model_cannot_have_its_code_run_unless_the_config_says_so(models, tmp_path, mark):
    folder = Path(shutil.copytree(models, tmp_path / "model"))
    (folder / "planted.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    planted = {"auto_map": {"AutoConfig": "planted.A", "AutoModelForCausalLM": "planted.B"}, "model_type": "planted"}
    (folder / "config.json").write_text(json.dumps(config | planted))
    with pytest.raises(UserError, match=r"model\.path"):
        load_base(str(folder))
