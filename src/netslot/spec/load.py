"""From ``netslot.toml`` and the files it names to a checked :class:`~netslot.spec.model.HostSpec`.

Every problem that can be found is found before anything is refused, so a person mends a file in one go.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from netslot.errors import SpecError, UsageError
from netslot.spec import assemble, crosschecks, parameters, rosters, variables
from netslot.spec.convert import convert
from netslot.spec.document import ClassSection, Document, ParameterSection, RulesSection
from netslot.spec.lines import key_lines
from netslot.spec.model import DEFAULT_CLASS, ClassSpec, HostSpec, Root, RuleFile, Rules
from netslot.spec.problems import Problems
from netslot.spec.render import nearest, variables_in
from netslot.spec.roster import Resident

_CLASS_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_PER_CLASS = tuple(name for name in ClassSection.__struct_fields__ if name != "slots")
"""Sections that a class takes from the host; it may replace their keys one by one, and rules as a whole."""


def load(file: str | Path, *, slots: int | None = None) -> HostSpec:
    """Read and check a spec file. SpecError names file, line and key of everything that is wrong.

    ``slots`` stands in for the file's own number, in a spec without classes.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"cannot read the spec: {reason}", file=str(path), hint="netslot reads TOML files") from error
    return parse(text, path, slots=slots)


def parse(
    text: str,
    path: Path,
    *,
    slots: int | None = None,
    files: Mapping[str, str] | None = None,
    numbers: Mapping[str, int] | None = None,
) -> HostSpec:
    """As :func:`load`, for a text that is or would be the content of ``path``.

    ``files`` holds texts of rule files and of the roster by path, which then are not read; ``numbers`` the slots of
    the roster's tenants, which otherwise are numbered in its order.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        raise SpecError(f"no valid TOML: {message}", file=str(path), line=int(line[1]) if line else None) from error
    if slots is not None:
        raw["slots"] = slots
    problems = Problems(str(path), key_lines(text))
    document = convert(raw, Document, (), problems)
    problems.raise_any()
    assert document is not None
    roster = rosters.read(path, document.roster, files or {}, problems) if document.roster else None
    classes = _classes(raw, document, problems, has_roster=roster is not None)
    problems.raise_any()
    residents = rosters.by_class(roster, classes, numbers or {}, problems)
    problems.raise_any()
    spec = _Builder(path, document, problems, files or {}).build(classes, residents)
    problems.raise_any()
    return spec


def _classes(
    raw: Mapping[str, Any], document: Document, problems: Problems, *, has_roster: bool
) -> dict[str, ClassSection]:
    """Each class with the host's sections below its own; one class where the spec names none."""
    if document.classes and document.slots is not None:
        hint = "remove this line"
        problems.add(("slots",), "with [class.*], each class says how many slots it has", hint=hint)
    if not document.classes and document.slots is None and not has_roster:
        problems.add((), "'slots' is missing", hint="slots = 100, or [class.NAME] tables that each have it")
    classes: dict[str, ClassSection] = {}
    alone = {} if document.slots is None else {"slots": document.slots}
    for name, table in (raw.get("class") or {DEFAULT_CLASS: alone}).items():
        if not _CLASS_NAME.fullmatch(name):
            problems.add(("class", name), "a class is named by small letters, digits, '-' and '_', 32 at most")
        merged = {key: raw[key] for key in _PER_CLASS if key in raw} | table
        for key in _PER_CLASS:
            if key != "rules" and key in raw and key in table:
                merged[key] = raw[key] | table[key]
        section = convert(merged, ClassSection, ("class", name), problems)
        if section is not None:
            classes[name] = section
    return classes


class _Builder:
    """Checks what types cannot say, and puts the spec together."""

    def __init__(self, path: Path, document: Document, problems: Problems, files: Mapping[str, str]) -> None:
        self._path = path
        self._files = files
        self._document = document
        self._problems = problems
        self._digest_of_host = msgspec.json.encode((document.addresses, document.prefix, document.uplink))

    def build(self, classes: Mapping[str, ClassSection], residents: Mapping[str, Mapping[int, Resident]]) -> HostSpec:
        document, problems = self._document, self._problems
        numbered = any(name not in residents for name in classes)
        addresses = assemble.addresses(problems, document.addresses, needed=numbered)
        spec = HostSpec(
            file=self._path,
            prefix=document.prefix,
            uplink=document.uplink,
            addresses=addresses,
            root=self._root(),
            hold_down=assemble.seconds(document.limits.hold_down),
            classes={name: self._class(name, section, residents.get(name)) for name, section in classes.items()},
            roster=self._roster_file(),
            lines=problems.lines,
        )
        assemble.check_sizes(problems, spec)
        rosters.check(problems, spec)
        if spec.root.preset:  # otherwise the files are not netslot's to write variables into
            self._check_variables(spec.root.rules, spec.root_values(), {}, ("root",))
        for name, each in spec.classes.items():
            number = spec.sample(name)
            if not number:
                continue
            values = spec.values(number, name)
            if each.rules is not None:
                self._check_variables(each.rules, values, each.lists, ("class", name, "rules"))
            assemble.check_texts(problems, each, values)
            crosschecks.check(problems, each)
        return spec

    def _root(self) -> Root:
        section, files = self._document.root, RulesSection
        nft = section.nft if section.preset else ""
        rules = self._rules(files(backend=section.backend, ipv4=section.ipv4, ipv6=section.ipv6, nft=nft), ("root",))
        published: list[RuleFile | None] = []
        if not section.preset:
            named = (("nft", section.nft), ("nft6", section.nft6))
            published = [self._rule_file(name, ("root", key)) for key, name in named if name]
        elif section.nft6:
            self._problems.add(("root", "nft6"), "is only for a root without netslot's preset", hint="use nft")
        local = self._document.addresses.pool6.lower().startswith(("fc", "fd"))
        masquerade = section.masquerade and section.preset
        there = tuple(file for file in published if file is not None)
        return Root(rules, masquerade, masquerade and local, section.preset, there)

    def _roster_file(self) -> RuleFile | None:
        return self._rule_file(self._document.roster, ("roster",)) if self._document.roster else None

    def _rules(self, section: RulesSection, where: tuple[str, ...]) -> Rules:
        names = {"ipv4": section.ipv4, "ipv6": section.ipv6, "nft": section.nft}
        wrong = ("ipv4", "ipv6") if section.backend == "nftables" else ("nft",)
        for key in wrong:
            if names[key]:
                use = "nft" if section.backend == "nftables" else "ipv4 and ipv6"
                message = f"backend {section.backend} takes no {key}"
                self._problems.add((*where, key), message, hint=f"use {use}, or another backend")
        files = {key: self._rule_file(name, (*where, key)) for key, name in names.items() if name}
        return Rules(section.backend, **files)

    def _rule_file(self, name: str, where: tuple[str, ...]) -> RuleFile | None:
        path = self._path.parent / name
        try:
            known = self._files.get(str(path))
            return RuleFile(str(path), known if known is not None else path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            there = [each.name for each in path.parent.glob("*") if each.is_file()]
            close = nearest(path.name, there)
            self._problems.add(where, f"no such file: {path}", hint=f"did you mean {close}?" if close else None)
        except (OSError, UnicodeDecodeError) as error:
            self._problems.add(where, f"cannot read {path}: {error}")
        return None

    def _class(self, name: str, section: ClassSection, residents: Mapping[int, Resident] | None) -> ClassSpec:
        where = ("class", name)
        rules = self._rules(section.rules, (*where, "rules")) if section.rules is not None else None
        if rules is not None and not rules.files:
            rules = None
        bpf = assemble.resolve_objects(self._problems, section.bpf, self._path.parent, where)
        template = msgspec.structs.replace(section, slots=0, bpf=bpf)
        digest = hashlib.sha256(self._digest_of_host + msgspec.json.encode(template))
        for file in rules.files if rules is not None else ():
            digest.update(file.text.encode())
        for program in bpf.programs if bpf is not None else ():
            digest.update(Path(program.object).read_bytes() if Path(program.object).is_file() else b"")
        return ClassSpec(
            name=name,
            slots=(section.slots or 0) if residents is None else len(residents),
            attachment=section.attachment,
            rules=rules,
            parameters={
                key: self._parameter(key, each, (*where, "parameters", key))
                for key, each in section.parameters.items()
            },
            nat=section.nat,
            bpf=bpf,
            cgroup=section.cgroup,
            routes=section.routes,
            rates=section.rates,
            digest=digest.hexdigest(),
            residents=residents,
        )

    def _parameter(self, name: str, section: ParameterSection, where: tuple[str, ...]) -> parameters.Parameter:
        default: parameters.Bound = ()
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,24}", name) or name in variables.ALL:
            why = "is a variable's name" if name in variables.ALL else "is no name: letters, digits and '_'"
            self._problems.add(where, f"{name!r} {why}", hint="choose another name")
        if section.default is None and section.type not in parameters.LIST_KINDS:
            self._problems.add(where, f"a parameter of type {section.type} needs a default")
        elif section.default is not None:
            try:
                default = parameters.check(name, section.type, section.default, section.min, section.max)
            except UsageError as error:
                self._problems.add((*where, "default"), error.message, hint=error.hint)
        if (section.min, section.max) != (None, None) and section.type != "int":
            self._problems.add(where, "only a parameter of type int has min and max")
        return parameters.Parameter(name, section.type, default, section.min, section.max)

    def _check_variables(
        self, rules: Rules, values: Mapping[str, str], lists: Mapping[str, str], where: tuple[str, ...]
    ) -> None:
        known = set(values)
        for file in rules.files:
            iptables = file is not rules.nft
            fields = {
                f"{name}.{field}"
                for name, kind in lists.items()
                if kind == "ports"
                for field in parameters.PORT_FIELDS
            }
            for name in sorted(variables_in(file.text) - known - (fields if iptables else set())):
                self._problems.add_variable(file, name, known | fields, where)
