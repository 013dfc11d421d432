"""ComfyUI's own page in a browser, with nodes drawn the classic way or as Nodes 2.0."""

from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 120_000  # ms for a busy machine
# Until then the page may still put the last workflow in place of what a test loads.
LOADED = """wanted => window.app?.extensionManager?.workflow?.activeWorkflow && LiteGraph.vueNodesMode === wanted
    && !document.querySelector('#splash-loader') && 'LoraWorkbenchTrainer' in LiteGraph.registered_node_types"""
DRAW = """async wanted => {
    app.graph.clear();
    await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", wanted);
}"""
QUIET = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}


@contextmanager
def drawn(server, new_nodes: bool) -> Iterator[None]:
    """Inside, the server's pages draw nodes the new way or not; afterwards the classic way."""
    server.post("/settings", {**QUIET, "Comfy.VueNodes.Enabled": new_nodes})
    try:
        yield
    finally:
        server.post("/settings", {"Comfy.VueNodes.Enabled": False})


def opened(context, server, new_nodes: bool, patience: int = PATIENCE):
    """A new page of the server, ready for a workflow; `page.problems` collects uncaught errors."""
    page = context.new_page()
    page.set_default_timeout(patience)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(server.url, wait_until="domcontentloaded")
    return ready(page, new_nodes)


def ready(page, new_nodes: bool):
    """The page, once a workflow can be loaded into it."""
    page.wait_for_function(LOADED, arg=new_nodes)
    page.keyboard.press("Escape")
    return page


def draw_nodes(page, new_nodes: bool) -> None:
    """Empties the graph and draws nodes the new way or not from now on."""
    page.evaluate(DRAW, new_nodes)
    page.wait_for_function("wanted => LiteGraph.vueNodesMode === wanted", arg=new_nodes)
