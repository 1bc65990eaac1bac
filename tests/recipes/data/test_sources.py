import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from xformer_train.recipes.config import SourceConfig
from xformer_train.recipes.data.sources import is_held_out, open_source


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(kind, path, **keys):
        source = open_source(SourceConfig(kind=kind, path=str(path), **keys), tmp_path / "cache")
        found = list(source.documents())
        assert list(source.documents()) == found
        return found

    return read


def test_text_documents_end_at_blank_lines(tmp_path, documents):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \t\r\nthree\n")
    assert documents("text", "a.txt") == ["one\ntwo", "three"]


def test_text_documents_of_wikitext_begin_at_titles(tmp_path, documents):
    text = " \n = First = \n \n One . \n \n = = Part = = \n \n Two . \n = no title =\n \n = 2 = \n \n Three . \n"
    (tmp_path / "w.txt").write_text(text)
    found = documents("text", "w.txt")
    assert [document.split()[1] for document in found] == ["First", "2"]
    assert "= = Part = =" in found[0]
    assert "= no title =" in found[0]


def test_a_file_or_a_line_is_one_document_where_the_source_says_so(tmp_path, documents):
    (tmp_path / "a.txt").write_text("\n = Title = \n\nOne.\n\nTwo.\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"Three.\r\n\r\nFour."))
    assert documents("text", ".", documents="file") == ["= Title = \n\nOne.\n\nTwo.", "Three.\n\nFour."]
    assert documents("text", ".", documents="line") == ["= Title =", "One.", "Two.", "Three.", "Four."]
    identities = [
        open_source(SourceConfig(kind="text", path=str(tmp_path), documents=one), tmp_path / "cache").identity
        for one in ("auto", "line", "file")
    ]
    assert len(set(identities)) == 3


def test_files_come_in_the_order_of_their_names_from_folders_and_globs(tmp_path, documents):
    for name in ("b.txt", "a.txt", "sub/c.txt", "skipped.csv"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    assert documents("text", "d") == ["a.txt", "b.txt", "sub/c.txt"]
    assert documents("text", "d/*.csv") == ["skipped.csv"]
    assert documents("text", tmp_path / "d" / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_jsonl_and_parquet_give_the_named_field_and_skip_empty_rows(tmp_path, documents):
    rows = [{"body": "eins", "n": 1}, {"body": ""}, {"body": None}, {"body": "zwei\n\ndrei"}]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"body": [row["body"] for row in rows], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for kind, path in (("jsonl", "a.jsonl"), ("jsonl", "a.json.gz"), ("parquet", "a.parquet")):
        assert documents(kind, path, text_field="body") == ["eins", "zwei\n\ndrei"]


def test_local_datasets_of_both_kinds_are_read(tmp_path, documents, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).save_to_disk(str(tmp_path / "saved"))
    assert documents("hf", "saved") == ["a", "b"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    assert documents("hf", tmp_path / "folder") == ["c", "d"]
    assert documents("hf", tmp_path / "folder", streaming=True) == ["c", "d"]
    with pytest.raises(ValueError, match=r"there is no body, only text"):
        documents("hf", tmp_path / "folder", text_field="body")
    with pytest.raises(ValueError, match=r"hf .*folder: Unknown split .*correct data.sources"):
        documents("hf", tmp_path / "folder", split="test")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_that_breaks_off_is_named_with_the_reason(tmp_path, documents, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train-0.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder" / "train-1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n' * 9)[:-9])
    with pytest.raises(ValueError, match=r"^data source hf folder: Compressed file ended .*; correct data.sources"):
        documents("hf", "folder", streaming=streaming)


def test_a_hub_dataset_that_cannot_be_reached_is_named(documents, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"^data source hf some/set: Couldn't reach .*; .*check the network$"):
        documents("hf", "some/set")


@pytest.mark.parametrize(
    "kind,name,content,message",
    [
        ("text", "missing.txt", None, r"text missing\.txt: there is no such file or folder"),
        ("text", "*.txt", None, r"text \*\.txt: no file matches"),
        (
            "text",
            "latin.txt",
            b"gut\nsch\xf6n\n",
            r"latin\.txt, line 2: byte 7 of the file, 0xf6, is not UTF-8; .*iconv",
        ),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl, line 3: holds a list"),
        (
            "jsonl",
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"a\.jsonl, line 1: there is no text, only body, id; set text_field",
        ),
        ("jsonl", "a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: text holds a int"),
        pytest.param(
            "jsonl", "a.jsonl", b"[" * 99_999, r"a\.jsonl, line 1: not JSON \(maximum recursion", id="99,999 brackets"
        ),
        pytest.param(
            "jsonl",
            "a.jsonl",
            b'{"text": "x", "n": ' + b"9" * 9999 + b"}",
            r"a\.jsonl, line 1: not JSON \(.*digits",
            id="9,999 digits",
        ),
        (
            "jsonl",
            "a.jsonl",
            b'{"text": "x"}\n{"text": "ab\\ud83d"}\n',
            r"a\.jsonl, line 2: character 3 of text is half of a surrogate pair, U\+D83D; correct",
        ),
        ("jsonl", "a.json.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], r"a\.json\.gz: damaged gzip"),
        ("jsonl", "a.json.gz", b"not gzip", r"a\.json\.gz: damaged gzip"),
        ("text", "a.txt", gzip.compress(b"text"), r"a\.txt: the file is compressed, not text; .* end in \.gz"),
        ("text", "a.txt", b"\x28\xb5\x2f\xfd0123", r"a\.txt: the file is compressed"),
        ("jsonl", "a.jsonl.zst", b"\x28\xb5\x2f\xfd0123", r"a\.jsonl\.zst is compressed in a way that is not read"),
        ("parquet", "a.parquet", b"PAR0", r"a\.parquet: not a parquet file"),
    ],
)
def test_bad_files_are_named_with_the_place_and_the_remedy(tmp_path, documents, kind, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents(kind, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["compression", "text", "footer"])
def test_a_damaged_parquet_file_is_named(tmp_path, documents, damage):
    path = tmp_path / "a.parquet"
    if damage == "text":
        column = pyarrow.array([b"ab\xff"]).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    else:
        lines = [f"line {number} of many" for number in range(999)]
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), path, compression="snappy")
        content = bytearray(path.read_bytes())
        if damage == "footer":
            content[-40:-10] = b"\xff" * 30
        else:
            content[500:1500] = bytes(1000)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: damaged parquet file \(.+\); fetch it again$"):
        documents("parquet", "a.parquet")


def test_a_folder_without_a_fitting_file_is_an_error(tmp_path, documents):
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match=r"the folder holds no \.parquet file"):
        documents("parquet", "d")


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path, documents):
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: there is no text, only a, b"):
        documents("parquet", "a.parquet")


def test_identity_follows_the_bytes_and_not_the_name_or_the_time(tmp_path):
    def identity(name):
        return open_source(SourceConfig(kind="text", path=str(tmp_path / name)), tmp_path / "cache").identity

    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    first = identity("a.txt")
    assert identity("b.txt") == first
    (tmp_path / "a.txt").write_text("diff")
    assert identity("a.txt") != first


def test_a_file_is_hashed_once_while_it_does_not_change(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = SourceConfig(kind="text", path=str(path))
    first = open_source(source, tmp_path / "cache").identity
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert open_source(source, tmp_path / "cache").identity == first


def test_held_out_documents_are_chosen_by_content_in_the_given_share():
    texts = [f"document {number}" for number in range(4000)]
    out = {text for text in texts if is_held_out(text, 0.1)}
    assert abs(len(out) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert out < {text for text in texts if is_held_out(text, 0.2)}
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_a_line_like_a_title_does_not_join_the_documents_of_a_file_that_begins_without_one(tmp_path, documents):
    (tmp_path / "a.txt").write_text("One.\n\n= 12 =\n\nTwo.\n\nThree.\n")
    assert documents("text", "a.txt") == ["One.", "= 12 =", "Two.", "Three."]


def test_hidden_files_of_a_folder_are_left_out(tmp_path, documents):
    for name in ("a.txt", ".b.txt", "._a.txt", ".git/c.txt", "d/.e/f.txt", "d/g.txt"):
        (tmp_path / "in.folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in.folder" / name).write_text(name)
    assert documents("text", "in.folder") == ["a.txt", "d/g.txt"]
    assert documents("text", "in.folder/.b.txt") == [".b.txt"]


@pytest.mark.parametrize("ending", [".zst", ".xz", ".bz2"])
def test_a_folder_is_not_read_by_half(tmp_path, documents, ending):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "d" / f"b.jsonl{ending}").write_bytes(b"packed")
    with pytest.raises(ValueError, match=rf"b\.jsonl\{ending} is compressed in a way that is not read; unpack it"):
        documents("jsonl", "d")


def test_text_under_a_name_of_gzip_is_refused_though_it_was_prepared_under_another(tmp_path, documents):
    (tmp_path / "a.txt").write_text("text")
    assert documents("text", "a.txt") == ["text"]
    (tmp_path / "a.txt.gz").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt\.gz: damaged gzip file"):
        documents("text", "a.txt.gz")


def test_splits_and_slices_of_saved_datasets_are_what_they_say(tmp_path, documents):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    texts = [str(number) for number in range(10)]
    whole = datasets.Dataset.from_dict({"text": texts})
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select([3, 4])}).save_to_disk(str(tmp_path / "two"))
    for folder in ("one", "two"):
        assert documents("hf", folder) == texts
        assert documents("hf", folder, split="train[:90%]") == texts[:9]
        assert documents("hf", folder, split="train[90%:]") == ["9"]
        assert documents("hf", folder, split="train[-3:-1]") == ["7", "8"]
        assert documents("hf", folder, split="train[:2]+train[8:]") == ["0", "1", "8", "9"]
        for split in ("valid", "train[", "train[:300%]", "train[:90%]x", ""):
            with pytest.raises(ValueError, match=r"Unknown split .*correct data.sources"):
                documents("hf", folder, split=split)
        with pytest.raises(ValueError, match='has no subsets, and "en" is asked for'):
            documents("hf", folder, subset="en")
    assert documents("hf", "two", split="train[:1]+test") == ["0", "3", "4"]
    identities = {
        open_source(SourceConfig(kind="hf", path=str(tmp_path / "one"), split=split), tmp_path / "cache").identity
        for split in ("train", "train[:90%]", "train[90%:]")
    }
    assert len(identities) == 3
