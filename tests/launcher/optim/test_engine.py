import re
from types import SimpleNamespace

import pytest

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.optim.engine import check_deepspeed_config

ALONE = SimpleNamespace(tensor_parallel=1)


@pytest.mark.parametrize(
    "given,said",
    [
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 7}}},
            "offload_optimizer.ratio Input should be less than",
        ),
        ({"checkpoint": {"tag_validation": "loud"}}, "invalid tag_validation value of LOUD"),
        ({"gradient_clipping": 1, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, ""),
    ],
)
def test_what_deepspeed_refuses_is_one_sentence(given, said):
    check_deepspeed_config({"train_batch_size": 4}, ALONE)
    with pytest.raises(UserError, match=rf"deepspeed: DeepSpeed refuses these settings \(.*{re.escape(said)}") as error:
        check_deepspeed_config({"train_batch_size": 4, **given}, ALONE)
    assert str(error.value).endswith("; correct the section deepspeed")
    assert "\n" not in str(error.value)
