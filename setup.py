"The package's metadata, read from settings.ini; name, address and build system stand in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key:str) -> list[str]:
    "The entries of a setting that has one on each line."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=[word.strip() for word in cfg["keywords"].split(",")],
    classifiers=lines("classifiers"),
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={extra: lines(f"{extra}_requirements") for extra in ("course", "data", "hub", "dev")},
    packages=find_packages(include=["fastdiff_edu", "fastdiff_edu.*"]),
    package_data={"fastdiff_edu": ["py.typed"]},
    entry_points={"console_scripts": ["fastdiff = fastdiff_edu.cli:main"],
                  "nbdev": ["fastdiff_edu = fastdiff_edu._modidx:d"]},
)
