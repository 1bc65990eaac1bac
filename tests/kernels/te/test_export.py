"""torch.export and ONNX: every module as a graph of torch's own operators, for sizes that it was not exported with."""

import pytest
import torch
from torch.export import Dim, export

from xformer_train.kernels import (
    DeepSpeedTransformerConfig,
    DeepSpeedTransformerLayer,
    LayerConfig,
    TransformerLayer,
    te,
)

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
DEEPSPEED = {"hidden_size": 32, "heads": 4, "num_hidden_layers": 2, "initializer_range": 0.02}
OF_TODAY = {
    "norm": "rms_norm",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "gated_mlp": True,
    "num_key_value_heads": 2,
    "qk_norm": True,
    "rope_theta": 1e4,
}
MODULES = {
    "Linear": lambda: te.Linear(32, 48),
    "LayerNorm": lambda: te.LayerNorm(32),
    "RMSNorm": lambda: te.RMSNorm(32),
    "LayerNormLinear": lambda: te.LayerNormLinear(32, 48, return_layernorm_output=True),
    "LayerNormMLP": lambda: te.LayerNormMLP(32, 64),
    "gated": lambda: te.LayerNormMLP(32, 64, activation="swiglu", normalization="RMSNorm"),
    "TransformerLayer": lambda: te.TransformerLayer(32, 64, 4),
    "padding": lambda: te.TransformerLayer(32, 64, 4, fuse_qkv_params=True, self_attn_mask_type="padding"),
    "groups": lambda: te.TransformerLayer(32, 64, 4, num_gqa_groups=2, output_layernorm=True),
    "decoder": lambda: te.TransformerLayer(32, 64, 4, layer_type="decoder"),
    "ours": lambda: TransformerLayer(LayerConfig(**SIZES)),
    "post-LN": lambda: TransformerLayer(LayerConfig(**SIZES, pre_layer_norm=False, hidden_act="gelu_tanh")),
    "of today": lambda: TransformerLayer(LayerConfig(**SIZES, **OF_TODAY)),
    "windows": lambda: TransformerLayer(
        LayerConfig(**SIZES, num_key_value_heads=2, rope_theta=1e4, attention_window=2)
    ),
    "DeepSpeed's": lambda: DeepSpeedTransformerLayer(
        DeepSpeedTransformerConfig(**DEEPSPEED, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
    ),
}


def arguments(name, length, batch):
    x = torch.randn(length, batch, 32)
    if name == "decoder":
        return x, None, torch.randn(length + 2, batch, 32)
    if name == "padding":
        mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool)
        mask[0, ..., -2:] = True
        return x, mask
    return (x,)


def exported(name, module, *, training=False):
    length, batch = Dim("length", min=3), Dim("batch", min=2)
    shapes = {"decoder": (None, {0: length + 2, 1: batch}), "padding": ({0: batch, 3: length},)}.get(name, ())
    shapes = ({0: length, 1: batch}, *shapes)
    return export(module.train(training), arguments(name, 5, 2), dynamic_shapes=shapes, strict=False)


def results(module, *given):
    torch.manual_seed(1)
    found = module(*given)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_an_exported_module_computes_with_torchs_operators_what_the_module_does(name, training):
    torch.manual_seed(0)
    module = MODULES[name]()
    program = exported(name, module, training=training)
    assert not [node for node in program.graph.nodes if "xformer" in str(node.target) or "mkldnn" in str(node.target)]
    graph = program.module()
    for sizes in ((5, 2), (9, 3)):
        given = arguments(name, *sizes)
        for ours, expected in zip(results(graph, *given), results(module, *given), strict=True):
            torch.testing.assert_close(ours, expected)
    given[0].requires_grad_()
    gradients = [torch.autograd.grad(results(run, *given)[0].square().sum(), given[0])[0] for run in (graph, module)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", MODULES)
def test_onnx_runtime_computes_what_the_module_does(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = MODULES[name]()
    torch.onnx.export(exported(name, module), dynamo=True, verbose=False).save(tmp_path / "module.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "module.onnx")
    given = arguments(name, 9, 3)
    with torch.no_grad():
        expected = results(module, *given)
    named = zip(session.get_inputs(), (tensor.numpy() for tensor in given if tensor is not None), strict=True)
    found = session.run(None, {entry.name: value for entry, value in named})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=1e-5)
