"""The protocols of `conf/protocol`, composed."""

from functools import cache

from hydra import compose, initialize_config_dir

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR
from depthkit.evaluation.settings import ProtocolConfig

SHIPPED = sorted(path.stem for path in (CONF_DIR / "protocol").glob("*.yaml"))


@cache
def shipped(name: str) -> ProtocolConfig:
    register_schemas()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(compose(f"protocol/{name}").protocol)
