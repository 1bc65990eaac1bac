"""What the docs say of policies."""

import re
from pathlib import Path

from helpers.own_policies import MODELS_WITH_POLICIES, OpenAIGPTPolicy

from xformer_train.recipes.policies.catalog.lookup import SHIPPED
from xformer_train.recipes.policies.sharding.plan import make_plan

DOCS = (Path(__file__).parents[3] / "docs/huggingface.md").read_text(encoding="utf-8")


def test_the_policy_in_the_docs_works():
    example = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "(Policy):" in block)
    names: dict[str, object] = {}
    exec(example, names)
    model = MODELS_WITH_POLICIES["openai"].build()
    cuts = [one.cuts for one in make_plan(model, [names["OpenAIGPTPolicy"]], 2).projections]
    assert cuts == [one.cuts for one in make_plan(model, [OpenAIGPTPolicy], 2).projections]


def test_the_list_of_models_in_the_docs_is_that_of_the_policies():
    rows = [line.split("|")[2:4] for line in DOCS.splitlines() if line.startswith("| ")]
    listed = {
        name for layers, shard, *_ in rows if shard.strip().startswith("yes") for name in re.findall(r"`(\w+)`", layers)
    }
    assert listed == {name.rpartition(".")[2] for name in SHIPPED}
