import pytest

from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer.training.source_code_documents import cut_documents, read_packages


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two packages of 20 files, one of 3, and files that must not count."""
    folder = tmp_path_factory.mktemp("library")
    for package, count in (("apples", 20), ("pears", 20), ("few", 3), ("site-packages", 30)):
        (folder / package).mkdir()
        for i in range(count):
            text = f"import {package}\n" + f"{package}_{i} = {i} + len('{package[0]}')\n" * 40
            (folder / package / f"module_{i}.py").write_text(text)
    (folder / "apples" / "empty.py").touch()
    (folder / "apples" / "module_0.py").write_bytes(b"# \xff not utf-8\n" * 200)
    (folder / "top_level.py").write_text("import apples")
    return folder


@pytest.fixture(scope="module")
def tokenizer(library):
    texts = [text for texts in read_packages(library).values() for text in texts]
    return train_byte_level_tokenizer(texts, vocab_size=300)


def test_packages_with_enough_files_without_their_names(library):
    packages = read_packages(library)
    assert {name: len(texts) for name, texts in packages.items()} == {"apples": 20, "pears": 20}
    assert all("import package" in text for text in packages["pears"])
    assert not any("import pears" in text for text in packages["pears"])


def test_windows_are_balanced_within_length_and_split_by_file(library, tokenizer):
    documents = cut_documents(
        read_packages(library),
        tokenizer,
        train_per_class=18,
        test_per_class=6,
        min_length=100,
        max_length=150,
    )
    assert documents.label_names == ["apples", "pears"]
    for part, count in ((documents.train, 18), (documents.test, 6)):
        assert [sum(d.label == label for d in part) for label in (0, 1)] == [count, count]
        assert all(100 <= len(d.input_ids) <= 148 for d in part)
        assert all(tokenizer.decode(d.input_ids) == d.text for d in part)
    numbers = [
        {d.text.split("pears_")[1].split()[0] for d in part if "pears_" in d.text}
        for part in (documents.train, documents.test)
    ]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]


def test_same_seed_same_documents(library, tokenizer):
    def cut(seed):
        packages = read_packages(library, seed=seed)
        return cut_documents(packages, tokenizer, min_length=50, max_length=80, seed=seed)

    assert cut(1) == cut(1)
    assert cut(1) != cut(2)


def test_a_library_without_sources_is_named(tmp_path, library, tokenizer):
    with pytest.raises(ValueError, match=r"has 0 packages .* Pass your own documents with --data"):
        read_packages(tmp_path)
    with pytest.raises(ValueError, match="Only 0 packages"):
        cut_documents(read_packages(library), tokenizer, min_length=10**6, max_length=10**7)


def test_this_python_has_documents():
    packages = read_packages()
    assert len(packages) >= 2
    assert all(len(texts) >= 20 for texts in packages.values())
