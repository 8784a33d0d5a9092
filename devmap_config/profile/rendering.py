"""Renders the templates in a document's values, and in those of its keys that name devices or modules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from devmap_config.profile.document import MappingNode, Node, ScalarNode, SequenceNode, without_duplicates
from devmap_config.profile.merging import change_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Sink

UNRENDERED = ("variables", "extends")
"""Top-level keys whose values cannot be templates, because templates are rendered with them."""

MAX_TEMPLATES = 500
"""The most different templates in a profile and the files that it extends; each takes a few milliseconds at most."""

NAMED = (("hardware", "devices"), ("hardware", "links"), ("placement", "max_memory"), ("placement", "device_map"))
"""Mappings whose keys name devices or modules."""


@dataclass
class Renderer:
    """Renders templates with variables; a template that cannot be rendered is reported and stays as it is."""

    variables: Mapping[str, object]
    sink: Sink
    _rendered: dict[str, str] = field(default_factory=dict)
    _tried: int = 0

    def values(self, document: MappingNode) -> MappingNode:
        """Return a document with its values rendered."""
        entries = (
            entry if entry.key.text in UNRENDERED else replace(entry, value=self.node(entry.value))
            for entry in document.entries
        )
        return replace(document, entries=tuple(entries))

    def names(self, document: MappingNode) -> MappingNode:
        """Return a document with those keys rendered that name devices or modules."""
        for route in NAMED:
            document = change_mapping(document, route, self.keys)
        return change_mapping(document, ("hardware", "hosts"), self._names_within_hosts)

    def _names_within_hosts(self, hosts: MappingNode) -> MappingNode:
        entries = []
        for entry in hosts.entries:
            value = entry.value
            for key in ("devices", "links"):
                value = change_mapping(value, (key,), self.keys) if isinstance(value, MappingNode) else value
            entries.append(replace(entry, value=value))
        return replace(hosts, entries=tuple(entries))

    def keys(self, mapping: MappingNode) -> MappingNode:
        """Return a mapping with its keys rendered; if two render to the same text, the second is reported."""
        entries = [replace(entry, key=self.scalar(entry.key)) for entry in mapping.entries]
        return replace(mapping, entries=without_duplicates(entries, self.sink))

    def node(self, node: Node) -> Node:
        """Return a node with its scalars rendered."""
        if isinstance(node, ScalarNode):
            return self.scalar(node)
        if isinstance(node, SequenceNode):
            return replace(node, items=tuple(map(self.node, node.items)))
        return replace(node, entries=tuple(replace(entry, value=self.node(entry.value)) for entry in node.entries))

    def scalar(self, node: ScalarNode) -> ScalarNode:
        """Return a scalar rendered, as if it had been written without quotes, so that the type of its field decides."""
        if not any(mark in node.text for mark in ("{{", "{%", "{#")):
            return node
        from devmap_config.profile.template import TemplateRefusedError  # imports jinja2

        try:
            return ScalarNode(self.rendered(node.text), node.span)
        except TemplateRefusedError as error:
            self.sink.error(error.code, error.message, node.span, help=error.help)
            return replace(node, is_unrendered=True)

    def rendered(self, text: str) -> str:
        """Return a template rendered; each different text is rendered only once.

        Raises:
            TemplateRefusedError: if it cannot be rendered, or there are too many templates.
        """
        from devmap_config.profile.template import TemplateRefusedError, render

        if text not in self._rendered:
            self._tried += 1
            if self._tried > MAX_TEMPLATES:
                message = f"there are more than {MAX_TEMPLATES} different templates"
                raise TemplateRefusedError("template-limit", message, "write values out, or use patterns and ranges")
            self._rendered[text] = render(text, self.variables)
        return self._rendered[text]
