"""`imprompt inspect` and `imprompt convert`."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imprompt.cli.console import print_json
from imprompt.config import ConvertConfig, InspectConfig
from imprompt.utils.text import escape


def run_inspect(config: InspectConfig, *, json: bool) -> None:
    """Print type, tokens, layers, base family, encoder and parameters of an adapter file."""
    from imprompt.models import checkpoints, hub

    path, _ = hub.resolve_adapter(config.file)
    _, spec = checkpoints.read_adapter(path)
    checkpoints.report_assumptions(spec, path.name)
    facts = {
        "adapter_type": spec.adapter_type,
        "tokens": spec.num_tokens or "one per patch",
        "layers": len(spec.layers),
        "base": spec.base_model,
        "encoder": spec.image_encoder,
        "cross_attention_dim": spec.cross_attention_dim,
        "parameters": spec.num_parameters,
        "dtype": spec.dtype,
    } | ({"faceid_version": spec.faceid_version} if spec.faceid_version else {})
    facts |= {key: value for key, value in spec.metadata.items() if key not in facts}
    if json:
        print_json(**facts)
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(Text(escape(name.replace("_", " "))), f"{value:,}" if name == "parameters" else Text(escape(value)))
    Console().print(table)


def run_convert(config: ConvertConfig, *, json: bool) -> None:
    """Convert an adapter file or training state to a public adapter file."""
    from imprompt.models import checkpoints, hub

    source, _ = hub.resolve_adapter(config.source)
    spec = checkpoints.convert_adapter(
        source, config.target, without_aggregator=config.without_aggregator, faceid_version=config.faceid_version
    )
    if json:
        print_json(target=config.target, adapter_type=spec.adapter_type, base=spec.base_model, parameters=spec.num_parameters)
        return
    print(escape(f"{config.target}: {spec.adapter_type} adapter for {spec.base_model}, {spec.num_parameters:,} parameters"))
