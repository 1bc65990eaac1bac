"""Hostfiles, and the hosts and slots that are chosen of them."""

import pytest

from xformer_train.launcher.machines.hostfile import choose_slots, read_hostfile

HOSTS = {"node1": (0, 1, 2, 3), "node2": (0, 1), "node3": (0, 1, 2, 3)}


def test_a_hostfile_may_have_comments_and_blank_lines(tmp_path):
    (tmp_path / "hosts").write_text("# ours\n\nnode1 slots=2 max_slots=4\n  node2   slots=1  # spare\n")
    assert read_hostfile(tmp_path / "hosts") == {"node1": (0, 1), "node2": (0,)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1\n", "hosts:1: got 'node1', must be one host and its slots"),
        ("node1 slots=two\n", "hosts:1: got 'node1 slots=two', must be one host and its slots"),
        ("node1 slots=2 node2 slots=2\n", "hosts:1: got 'node1 slots=2 node2 slots=2', must be one host and its slots"),
        ("node1 slots=2, node2\n", "must be one host and its slots"),
        ("node1 slots=1025\n", "hosts:1: host node1 has slots=1025, must be at most 1024"),
        (
            "node1 slots=" + "9" * 5000 + "\n",
            "hosts:1: host node1 has slots=99999999999999999999, must be at most 1024",
        ),
        ("node1 slots=1\n\nnode1 slots=1\n", "hosts:3: host node1 stands there twice"),
        ("node1 slots=0\n", "hosts:1: host node1 has no slots"),
        ("-oProxyCommand=x slots=1\n", "must be a name or address"),
        ("localhost slots=1\nnode2 slots=1\n", "localhost means another machine on each host"),
        ("me@node1 slots=1\n", "user and port go into ~/.ssh/config"),
        ("# nothing\n", "holds no host"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match="hosts") as error:
        read_hostfile(tmp_path / "hosts")
    assert said in str(error.value)


def test_a_hostfile_that_is_no_text_is_named(tmp_path):
    (tmp_path / "hosts").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--hostfile=.*/hosts is not UTF-8 text"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("choice", "slots"),
    [
        ({}, HOSTS),
        ({"num_nodes": 2}, {"node1": (0, 1, 2, 3), "node2": (0, 1)}),
        ({"num_gpus": 2}, {"node1": (0, 1), "node2": (0, 1), "node3": (0, 1)}),
        ({"include": "node3@node1:2,0"}, {"node1": (0, 2), "node3": (0, 1, 2, 3)}),  # ranks follow the hostfile
        ({"exclude": "node1:0@node2"}, {"node1": (1, 2, 3), "node3": (0, 1, 2, 3)}),
        ({"exclude": "node2:0,1"}, {"node1": (0, 1, 2, 3), "node3": (0, 1, 2, 3)}),
    ],
)
def test_slots_are_chosen_as_deepspeed_chooses_them(choice, slots):
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, parse_inclusion_exclusion

    assert choose_slots(HOSTS, **choice) == slots
    assert list(choose_slots(HOSTS, **choice)) == list(slots)
    counts = {host: len(own) for host, own in HOSTS.items()}
    theirs = parse_inclusion_exclusion(counts, choice.get("include", ""), choice.get("exclude", ""))
    theirs = apply_num_nodes_and_gpus(theirs, choice.get("num_nodes", -1), choice.get("num_gpus", -1))
    assert {host: tuple(own) for host, own in theirs.items()} == slots


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"include": "node9"}, "--include: host 'node9' is not in the hostfile, which has node1, node2, node3"),
        ({"include": "node2:2"}, "host node2 has slots 0 to 1 in the hostfile, and not slot 2"),
        ({"include": "node1:a"}, "must be a host and perhaps slots"),
        ({"include": "node1@node1:0"}, "host node1 is named twice"),
        ({"exclude": "node1@node2@node3"}, "leaves no slot"),
        ({"include": "node1", "exclude": "node2"}, "exclude each other"),
        ({"include": "node1", "num_nodes": 1}, "do not go with them"),
        ({"num_nodes": 4}, "--num-nodes is 4, must be at most 3, the number of hosts in the hostfile"),
        ({"num_gpus": 3}, "--num-gpus is 3, and host node2 has slots=2"),
    ],
)
def test_a_choice_that_the_hostfile_cannot_give_is_refused(choice, said):
    with pytest.raises(ValueError, match=r"host|exclude|slot") as error:
        choose_slots(HOSTS, **choice)
    assert said in str(error.value)
