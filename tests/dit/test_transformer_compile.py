"""torch.compile: one graph for all equal blocks, and none more for another scale, prompt or step."""

import pytest
import torch
import torch._dynamo.testing
from small_transformers import build_adapter, build_prompt, build_transformer, call_transformer

from imprompt.dit.injection import AttachedToTransformer


@pytest.mark.parametrize(("host", "family"), [("flux", "xlabs-flux"), ("flux", "instantx-flux"), ("sd3", "instantx-sd3")])
@pytest.mark.parametrize("is_regional", [False, True], ids=["whole", "blocks"])
def test_no_recompilation(host, family, is_regional):
    transformer = build_transformer(host)
    adapter = build_adapter(family, transformer)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]
    if is_regional:
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
    target = transformer if is_regional else torch.compile(transformer, backend=counter)
    with AttachedToTransformer(target, [build_prompt(adapter)], ("cond",)) as attached:
        compiled = call_transformer(target, host)
        graphs = counter.frame_count
        for prompt in (build_prompt(adapter, 3, scale=0.5), build_prompt(adapter, 4)):
            attached.prompts = [prompt]
            call_transformer(target, host, timestep=torch.full((2,), 0.3 if host == "flux" else 300.0))
    assert counter.frame_count == graphs and graphs <= (3 if is_regional else 2)
    torch._dynamo.reset()
    with AttachedToTransformer(build_transformer(host), [build_prompt(adapter)], ("cond",)) as attached:
        torch.testing.assert_close(call_transformer(attached._transformer, host), compiled, atol=1e-5, rtol=1e-5)
