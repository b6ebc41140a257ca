from pathlib import Path

from flash_eplb.eplb.config import Config

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_of_settings_is_the_code_s():
    for name, field in Config.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            default = int(default)
        elif isinstance(default, float):
            default = f"{default:g}"
        assert f"| `EPLB_{name.upper()}` | {default} | {field.description} |" in README
    assert README.count("| `EPLB_") == len(Config.model_fields)
