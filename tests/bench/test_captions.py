import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig, PreTrainedTokenizerFast

from rba_core.bench.captions import Captioner, caption_set
from rba_core.bench.dataset import BenchmarkSet
from rba_core.cli import main
from rba_core.errors import InputError

WORDS = ["<s>", "</s>", "<pad>", "<image>", *"a red can mug with letters on it".split()]


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """A Blip2ForConditionalGeneration's folder as the hub has it: a small network that ends its captions by chance."""
    folder = tmp_path_factory.mktemp("networks") / "small-blip2"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = Blip2ForConditionalGeneration(Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=28, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(**small, encoder_hidden_size=16, cross_attention_frequency=1, vocab_size=8).to_dict(),
        text_config=OPTConfig(vocab_size=len(WORDS), hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
                              bos_token_id=0, eos_token_id=1, pad_token_id=2, init_std=1.0).to_dict(),
        num_query_tokens=4, image_token_index=3,
    ))  # fmt: skip
    with torch.no_grad():
        network.query_tokens.normal_()
        network.language_projection.weight.normal_()
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<image>"]
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


def test_a_caption_is_the_networks_own_words(blip2):
    captioner, picture = Captioner(blip2), torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
    network = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    # the same by the parts: what the language model is given is the projected queries and the start token, each next word the likeliest
    with torch.no_grad():
        seen = network.vision_model((picture[None] - 0.5) / 0.25).last_hidden_state
        queries = network.language_projection(network.qformer(query_embeds=network.query_tokens, encoder_hidden_states=seen).last_hidden_state)
        given, words = torch.cat([queries, network.get_input_embeddings()(torch.tensor([[0]]))], 1), []
        while len(words) < 30:
            word = int(network.language_model(inputs_embeds=given).logits[0, -1].argmax())
            if word == 1:
                break
            words.append(word)
            given = torch.cat([given, network.get_input_embeddings()(torch.tensor([[word]]))], 1)
    assert captioner(picture) == " ".join(WORDS[word] for word in words if word > 3) != ""
    assert captioner(picture) == captioner(picture)


def test_items_without_a_caption_get_one(small_set, blip2, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(small_set, tmp_path / "set")
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    lines[0]["caption"], kept = "mine", {**lines[1]}
    del lines[1]["caption"]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["bench", "caption", str(folder), "--blip2", str(blip2)])
    assert "(1 captions)" in capsys.readouterr().out
    written = BenchmarkSet(folder)
    assert written[0].caption == "mine" and written[1].caption == Captioner(blip2)(written[1].truth)
    assert {**written.lines[1], "caption": kept["caption"]} == kept
    assert caption_set(folder, None) == 0
    with pytest.raises(InputError, match="limit: is 0"):
        caption_set(folder, None, limit=0)


def test_stopped_it_keeps_what_it_has(small_set, tmp_path):
    folder = shutil.copytree(small_set, tmp_path / "set")
    lines = [json.loads(line) | {"caption": None} for line in (folder / "index.jsonl").read_text().splitlines()]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_set(folder, lambda picture: "a can", progress=stop)
    assert [line["caption"] for line in BenchmarkSet(folder).lines] == ["a can", None]
    assert caption_set(folder, lambda picture: "a mug") == 1
    assert [line["caption"] for line in BenchmarkSet(folder).lines] == ["a can", "a mug"]


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="give blip2=PATH"):
        Captioner(str(tmp_path))
