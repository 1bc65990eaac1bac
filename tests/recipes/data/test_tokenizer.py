import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import DataConfig, SourceConfig, TokenizerConfig
from xformer_train.recipes.data import tokenizer as tokenizer_module
from xformer_train.recipes.data.sources import is_held_out, open_source
from xformer_train.recipes.data.tokenizer import build_tokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "The quick brown foxes jumped over the lazy dogs.",
    "Unbelievably, foxes don't jump: they leap!",
    "naïve café 東京",
] * 20
KINDS = [("wordpiece", "bert"), ("bpe", "bert"), ("bpe", "gpt"), ("bytes", "bert"), ("bytes", "gpt")]


def quiet(_):
    pass


def train(kind, model_type="bert", texts=TEXTS, **config):
    specials = RECIPES[model_type].tokenizer.specials
    return train_tokenizer(kind, TokenizerConfig(**{"vocab_size": 320, **config}), texts, quiet, specials=specials)


@pytest.mark.parametrize("kind,model_type", KINDS)
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, kind, model_type):
    tokenizer = train(kind, model_type)
    tokenizer.save(tmp_path / "new" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "new" / "tokenizer")
    assert loaded.equals(tokenizer)
    assert (loaded.kind, loaded.vocab_size, loaded.specials) == (kind, tokenizer.vocab_size, tokenizer.specials)
    assert np.array_equal(loaded.word_start, tokenizer.word_start)
    for first, second in zip(loaded.encode_batch(TEXTS), tokenizer.encode_batch(TEXTS), strict=True):
        assert np.array_equal(first, second)
    assert load_tokenizer(tmp_path / "new" / "tokenizer" / "tokenizer.json").equals(tokenizer)
    loaded.save(tmp_path / "new" / "tokenizer")  # on top of itself
    assert load_tokenizer(tmp_path / "new" / "tokenizer").equals(tokenizer)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer"]


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train("wordpiece")
    tokenizer.save(tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    assert theirs.mask_token_id == tokenizer.special_id("mask")
    assert theirs(TEXTS[0], add_special_tokens=False)["input_ids"] == tokenizer.encode_batch([TEXTS[0]])[0].tolist()


@pytest.mark.parametrize("kind,model_type", KINDS)
def test_specials_are_those_the_model_needs_and_text_cannot_contain_them(kind, model_type):
    tokenizer = train(kind, model_type)
    needed = ["pad", "cls", "sep", "mask"] if model_type == "bert" else ["eos"]
    ids = [tokenizer.special_id(name) for name in needed]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= set(tokenizer.special_ids.tolist())
    assert max(ids) < tokenizer.vocab_size
    encoded = tokenizer.encode_batch(["a [MASK] b [SEP] c <|endoftext|> d"])[0]
    assert not set(ids) & set(encoded.tolist())


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_byte_level_kinds_give_any_text_back(kind):
    tokenizer = train(kind, "gpt")
    text = "tab\there, \x00 zero, ümlaut, 漢字, 🦊 and  two spaces\n"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_bytes_are_the_256_byte_values_and_the_specials_behind_them():
    tokenizer = train("bytes", "gpt", texts=[])
    assert tokenizer.vocab_size == 257
    assert tokenizer.special_id("eos") == 256
    text = "".join(map(chr, range(0x180)))
    assert tokenizer.encode_batch([text, ""])[0].tolist() == list(text.encode())
    # The fast path agrees with the tokenizer that is saved.
    assert tokenizer.tokenizer.encode(text).ids == list(text.encode())


def test_wordpiece_lower_cases_if_asked():
    assert np.array_equal(*train("wordpiece").encode_batch(["The Quick", "the quick"]))
    assert not np.array_equal(*train("wordpiece", do_lower_case=False).encode_batch(["The Quick", "the quick"]))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "bytes"])
def test_words_start_where_white_space_was(kind):
    tokenizer = train(kind)
    ids = tokenizer.encode_batch([" quick unbelievable dogs"])[0]
    starts = np.flatnonzero(tokenizer.word_start[ids])
    words = ["".join(tokenizer.decode(part).split()) for part in np.split(ids, starts)[1:]]
    if kind == "wordpiece":
        words = [word.replace("#", "") for word in words]
    assert words == ["quick", "unbelievable", "dogs"]


def test_a_vocab_txt_is_a_wordpiece_tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "Fox"]) + "\n")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("wordpiece", 8)
    assert tokenizer.encode_batch(["Foxes", "dog"])[0].tolist() == [5, 6]
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert load_tokenizer(path, TokenizerConfig(do_lower_case=False)).encode_batch(["Foxes"])[0].tolist() == [7, 6]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 512}')
    assert load_tokenizer(tmp_path).encode_batch(["Foxes"])[0].tolist() == [7, 6]


def test_names_of_specials_are_read_from_the_file_beside_the_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<m>": 0, "<end>": 1, "a": 2, "</s>": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"a gpt needs eos .* has none; name \"eos_token\" in a tokenizer_config\.json"
    ):
        build_tokenizer(RECIPES["gpt"], TokenizerConfig(path=str(tmp_path)), DataConfig(), quiet)
    names = {"eos_token": "<end>", "mask_token": {"content": "<m>", "lstrip": True}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    loaded = build_tokenizer(RECIPES["gpt"], TokenizerConfig(path=str(tmp_path)), DataConfig(), quiet)
    assert loaded.specials == {"mask": "<m>", "eos": "<end>"}
    assert loaded.encode_batch(["a a a a"])[0].tolist() == [2, 2, 2, 2]  # not truncated
    with pytest.raises(ValueError, match="a bert needs pad, cls, sep among"):
        build_tokenizer(RECIPES["bert"], TokenizerConfig(path=str(tmp_path)), DataConfig(), quiet)


def test_a_new_tokenizer_is_trained_on_the_sources_without_held_out_text(tmp_path):
    words = [a + b + c for a in "klmnp" for b in "aeiou" for c in "rstvwz"]
    lines = [f"{word} {word} {word}" for word in words]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    source = SourceConfig(kind="text", path=str(tmp_path / "a.txt"))
    data = DataConfig(sources=[source], validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    told = []
    tokenizer = build_tokenizer(RECIPES["gpt"], TokenizerConfig(vocab_size=8000), data, told.append)
    assert told == [
        "training a bpe tokenizer of 8,000 symbols",
        "counted the words of the text; choosing the symbols among their parts",
    ]
    vocabulary = tokenizer.tokenizer.get_vocab()
    seen = {line for line in lines if not is_held_out(line, 0.5)}
    assert 20 < len(seen) < 130
    # With room for everything, each word that was seen is one symbol, and no other is.
    assert {word for word in words if f"Ġ{word}" in vocabulary} == {line.split()[0] for line in seen}
    again = build_tokenizer(RECIPES["gpt"], TokenizerConfig(vocab_size=8000), data, quiet)
    assert again.equals(tokenizer)


def test_a_very_long_text_is_trained_on_in_pieces(tmp_path, monkeypatch):
    text = " ".join(f"word{number}" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(tokenizer_module, "_LONGEST_TEXT", 100)
    source = open_source(SourceConfig(kind="text", path=str(tmp_path / "a.txt")), tmp_path / "cache")
    found = list(tokenizer_module._training_text([source], 0.0, quiet))
    assert "".join(found) == text
    assert max(map(len, found)) <= 100


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "there is no such file or folder"),
        ({}, "it holds neither tokenizer.json nor vocab.txt"),
        ({"tokenizer.json": "{"}, "not a tokenizer file"),
        ({"tokenizer.json": '{"a": 1}'}, "not a tokenizer file"),
        ({"vocab.txt": "a\nb\n"}, r"the vocabulary has no \[UNK\]"),
        ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": "{"}, r"tokenizer_config\.json is not JSON"),
    ],
)
def test_a_bad_path_is_one_clear_sentence(tmp_path, content, message):
    path = tmp_path / "t"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^tokenizer\.path.*{message}"):
        load_tokenizer(path)


@pytest.mark.parametrize("kind,size", [("bpe", 257), ("wordpiece", 5)])
def test_a_vocabulary_too_small_for_its_alphabet_is_refused(kind, size):
    with pytest.raises(ValueError, match=f"vocab_size={size}: a new {kind} tokenizer needs more than"):
        train(kind, "gpt" if kind == "bpe" else "bert", vocab_size=size)


def test_a_vocabulary_too_small_for_the_characters_of_the_text_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=20: too few for the characters of the text; set at least \d+"):
        train("wordpiece", vocab_size=20)


def test_training_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="hold no text to train a tokenizer on"):
        train("wordpiece", texts=[])


def test_equal_configs_get_the_same_wordpiece_although_its_training_does_not_repeat_itself(tmp_path):
    text = tmp_path / "text.txt"
    words = [f"{a}{b}{c}" for a in "aeiou" for b in "bcdfghklmnprst" for c in ("an", "or", "ist", "ung")]
    text.write_text("\n\n".join(" ".join(words[i:] + words[:i]) for i in range(50)))
    data = DataConfig(sources=[SourceConfig(kind="text", path=str(text))], cache_dir=str(tmp_path / "cache"))
    told = []
    config = TokenizerConfig(vocab_size=200)
    first = build_tokenizer(RECIPES["bert"], config, data, told.append)
    again = build_tokenizer(RECIPES["bert"], config, data, told.append)
    assert first.equals(again)
    assert len(told) == 2  # trained once
    other = build_tokenizer(RECIPES["bert"], TokenizerConfig(vocab_size=190), data, told.append)
    assert other.vocab_size == 190


CHINESE = ["你好世界。", "今天天气很好", "我喜欢学习语言"] * 40


def loaded(tmp_path, tokenizer, specials):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {f"{name}_token": token for name, token in specials.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(tmp_path)


def words_of(tokenizer, text):
    ids = tokenizer.encode_batch([text])[0]
    starts, ends = tokenizer.word_borders
    begins = starts[ids] | np.append(True, ends[ids][:-1])
    return len(ids), int(begins.sum())


@pytest.mark.parametrize("kind", ["bpe", "bytes", "wordpiece"])
def test_each_character_of_a_script_without_spaces_can_start_a_word(kind):
    tokenizer = train(kind, texts=CHINESE, vocab_size=400)
    _, count = words_of(tokenizer, "今天你好")
    assert 2 <= count <= 4
    latin, spaced = words_of(train(kind), "naïve café")
    assert spaced <= latin and spaced in (2, 3)


@pytest.mark.parametrize("marker", ["▁", "_"])
def test_words_are_found_whatever_sign_a_tokenizer_marks_them_with(tmp_path, marker):
    pieces = [("<unk>", 0.0), (f"{marker}the", -1.0), (f"{marker}fox", -2.0), ("es", -2.0), ("你", -3.0), ("好", -3.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(replacement=marker)
    assert words_of(loaded(tmp_path, unigram, {}), "the foxes你好") == (5, 4)


def test_words_are_found_where_their_ends_are_marked_or_tokens_are_words(tmp_path):
    vocab = {"f": 0, "o": 1, "x</w>": 2, "a</w>": 3}
    bpe = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert words_of(loaded(tmp_path, bpe, {}), "fox a fox") == (7, 3)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert words_of(loaded(tmp_path, words, {}), "a b a") == (3, 3)


def made_of_pieces(kind):
    """A tokenizer whose model has </s> and <mask> among its own pieces, as transformers saves them."""
    names = ["<unk>", "</s>", "<mask>"]
    letters = [f"{space}{letter}" for letter in "aefgdoxmsk</>" for space in ("", "▁")] + ["▁"]
    if kind == "unigram":
        made = Tokenizer(models.Unigram([(name, 0.0) for name in names] + [(one, -3.0) for one in letters], unk_id=0))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "bpe":
        vocab = {token: index for index, token in enumerate([*names, *letters, "</", "</s"])}
        made = Tokenizer(models.BPE(vocab, [("<", "/"), ("</", "s"), ("</s", ">")], unk_token="<unk>"))
    elif kind == "ignoring_merges":
        vocab = {token: index for index, token in enumerate([*names, *letters])}
        made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        model = {"wordpiece": models.WordPiece, "words": models.WordLevel}[kind]
        made = Tokenizer(model({token: index for index, token in enumerate([*names, "fox"])}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(names)
    return made


@pytest.mark.parametrize("kind", ["unigram", "bpe", "ignoring_merges", "wordpiece", "words"])
def test_special_tokens_in_a_text_stay_text_whatever_the_model(tmp_path, kind):
    made = made_of_pieces(kind)
    tokenizer = loaded(tmp_path, made, {"unk": "<unk>", "eos": "</s>", "mask": "<mask>"})
    for text in ("fox </s> <mask> dog", "</s>", "a</s></s>e<mask>", "<mask></s>"):
        ids = set(tokenizer.encode_batch([text])[0].tolist())
        assert not ids & {1, 2}, (text, ids)
    made.encode_special_tokens = True
    plain = "fox dog / mask > < s"
    assert tokenizer.encode_batch([plain])[0].tolist() == made.encode(plain, add_special_tokens=False).ids


def masked_from_text(tokenizer, reader, text, word):
    """The ids of a sentence with a word masked, by text and as in training, where the word is one token."""
    ids = tokenizer.encode_batch([text])[0].tolist()
    at = [index for index, one in enumerate(ids) if tokenizer.decode([one]).strip() == word]
    assert len(at) == 1, (ids, word)
    ids[at[0]] = tokenizer.special_id("mask")
    return reader.encode(text.replace(word, tokenizer.specials["mask"]), add_special_tokens=False).ids, ids


@pytest.mark.parametrize(
    "kind", ["bpe", "bpe_prefix", "bpe_prefix_lstrip", "wordpiece", "unigram", "unigram_lstrip", "unigram_first"]
)
@pytest.mark.parametrize("text", ["the old fox ran.", "fox ran the old", "the old, fox", "the olds, foxs"])
@pytest.mark.parametrize("word", ["old", "fox"])
def test_a_mask_in_a_text_has_the_ids_of_a_masked_sample(tmp_path, kind, text, word):
    mask = AddedToken("<mask>", lstrip=kind.endswith("lstrip"), special=True)
    if kind == "wordpiece" and "s," in text:
        pytest.skip("what follows a mask at once is a word of its own to WordPiece")
    if kind.startswith("bpe_"):
        plain = train("bpe", texts=["the old fox ran. fox ran the old, fox."] * 30, vocab_size=300)
        prefixed = Tokenizer.from_str(plain.tokenizer.to_str())
        prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        prefixed.add_special_tokens([mask])
        tokenizer = loaded(tmp_path, prefixed, {"mask": "<mask>"})
    elif kind.startswith("unigram"):
        letters = [(letter, -9.0) for letter in "theoldfxransx.,▁"]
        words = [(f"▁{one}", -2.0) for one in ("the", "old", "fox", "ran")]
        unigram = Tokenizer(models.Unigram([("<unk>", 0.0), *words, *letters], unk_id=0))
        scheme = "first" if kind.endswith("first") else "always"
        unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        unigram.decoder = decoders.Metaspace()
        unigram.add_special_tokens([mask])
        tokenizer = loaded(tmp_path, unigram, {"mask": "<mask>"})
    else:
        tokenizer = train(kind, texts=["the old fox ran. fox ran the old, fox.", "fox ran"] * 30, vocab_size=300)
    before = tokenizer.fingerprint
    found, expected = masked_from_text(tokenizer, tokenizer.reader(), text, word)
    assert found == expected
    assert tokenizer.fingerprint == before
    tokenizer.reader().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": tokenizer.specials["mask"]}))
    again = load_tokenizer(tmp_path)
    assert again._content() | {"specials": 0} == tokenizer._content() | {"specials": 0}


def test_a_vocab_txt_follows_the_settings_beside_it(tmp_path):
    vocabulary = ["\ufeff[PAD]", "[UNK]", "[CLS]", "[SEP]", "<m>", "schön", "schon", "##好", "你", "你好"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")

    def ids(text, **settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(tmp_path).encode_batch([text])[0].tolist()

    assert ids("Schön") == [6]
    assert ids("Schön", strip_accents=False) == [5]
    assert ids("schön", do_lower_case=False) == [5]
    assert ids("schön", do_lower_case=False, strip_accents=True) == [6]
    assert ids("你好") == [8, 1] and ids("你好", tokenize_chinese_chars=False) == [9]
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*strip_accents, .* must be true or false"):
        ids("a", strip_accents="no")
    (tmp_path / "tokenizer_config.json").unlink()
    assert "mask" not in load_tokenizer(tmp_path).specials and load_tokenizer(tmp_path).specials["pad"] == "[PAD]"
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": {"content": "<m>", "lstrip": true}}')
    assert load_tokenizer(tmp_path).special_id("mask") == 4


def test_a_wordpiece_can_be_trained_with_accents_and_without_chinese_characters_as_words():
    text = ["schön 你好"] * 30
    vocabulary = train("wordpiece", texts=text, strip_accents=False, tokenize_chinese_chars=False).tokenizer.get_vocab()
    assert {"schön", "你好"} <= vocabulary.keys()
    assert not {"schön", "你好"} & train("wordpiece", texts=text).tokenizer.get_vocab().keys()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_words_of_any_length_are_known_to_a_tokenizer_trained_on_them(kind):
    rng = np.random.default_rng(0)
    genome = "".join(rng.choice(list("acgt"), 100_000))
    tokenizer = train(kind, texts=[genome, "some words"], vocab_size=400)
    ids = tokenizer.encode_batch([genome])[0]
    assert not tokenizer.unknown_ids & set(ids.tolist()) and len(ids) < 60_000
    assert "".join(tokenizer.decode(ids).replace("#", "").split()) == genome


def test_a_tokenizer_of_short_words_is_the_same_as_ever():
    made = json.loads(train("wordpiece").tokenizer.to_str())
    assert made["pre_tokenizer"] == {"type": "BertPreTokenizer"}


def test_equal_documents_that_are_all_held_out_are_told_as_such(tmp_path):
    text = next(text for text in map(str, range(99)) if is_held_out(text, 0.5))
    (tmp_path / "a.txt").write_text(f"{text}\n\n" * 7)
    data = DataConfig(
        sources=[SourceConfig(kind="text", path=str(tmp_path / "a.txt"))],
        validation_fraction=0.5,
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(
        ValueError, match=r"data.validation_fraction=0.5 holds out all of the 7 documents of data.sources"
    ):
        build_tokenizer(RECIPES["bert"], TokenizerConfig(), data, quiet)
