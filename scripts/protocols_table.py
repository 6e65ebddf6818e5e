"""Write docs/protocols.md, the page of all evaluation protocols, from conf/protocol/.

python scripts/protocols_table.py
"""

from itertools import takewhile
from pathlib import Path

import hydra

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR
from depthkit.evaluation.describe import describe
from depthkit.evaluation.protocols import protocol_id
from depthkit.evaluation.settings import STANDARD_METRICS, ProtocolConfig
from depthkit.files import atomic_write

PAGE = Path(__file__).parents[1] / "docs" / "protocols.md"

HEAD = f"""\
# Evaluation protocols

`depthkit evaluate model=A,B dataset=MANIFEST protocol=NAME`. This page is made from `conf/protocol/` by
`python scripts/protocols_table.py`. The eight digits of an id are a hash of all that changes a number: numbers of one
metric are comparable when they agree, and a setting that you change (`protocol.max_depth=10`) changes them. A protocol
that is defined on certain ground truth refuses other manifests; `protocol.datasets=null` lifts that. How much each
choice moves a number: [why-your-number-differs.md](why-your-number-differs.md). The usual nine metrics are
{", ".join(STANDARD_METRICS)}; `protocol.metrics=[...]` chooses others.

| protocol | id | ground truth | metrics |
| --- | --- | --- | --- |
"""


def main() -> None:
    with atomic_write(PAGE) as file:
        file.write(page().encode())


def page() -> str:
    """The whole page: one table, then a section for each protocol."""
    names = sorted(path.stem for path in (CONF_DIR / "protocol").glob("*.yaml"))
    protocols = {name: composed(name) for name in names}
    table = "".join(row(name, protocol) for name, protocol in protocols.items())
    return HEAD + table + "".join(section(name, protocol) for name, protocol in protocols.items())


def composed(name: str) -> ProtocolConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        protocol = to_config(hydra.compose(f"protocol/{name}").protocol)
    assert isinstance(protocol, ProtocolConfig)
    return protocol


def row(name: str, protocol: ProtocolConfig) -> str:
    datasets = ", ".join(protocol.datasets or ["any"])
    metrics = "the usual nine" if protocol.metrics == STANDARD_METRICS else ", ".join(protocol.metrics)
    return f"| [{name}](#{name}) | `{protocol_id(protocol)}` | {datasets} | {metrics} |\n"


def section(name: str, protocol: ProtocolConfig) -> str:
    """The comment that the YAML begins with, and the protocol in plain words."""
    lines = (CONF_DIR / "protocol" / f"{name}.yaml").read_text().splitlines()
    source = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return f"\n## {name}\n\n{source}\n\nStep by step: {describe(protocol)}\n"


if __name__ == "__main__":
    main()
