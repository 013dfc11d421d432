"""ComfyUI's own page in a headless Chromium."""

import pytest

READY = "() => window.app?.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 50"


@pytest.fixture(scope="module")
def browser(chromium):
    """A headless Chromium under playwright, closed before other tests need an event loop: playwright holds one."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A new page that shows ComfyUI, ready for a workflow; `page.problems` collects uncaught errors."""
    server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False})
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=120_000)
    yield page
    page.close()


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes 2.0"])
def new_nodes(request, opened):
    """Whether the nodes on the module's `opened` page are drawn the new way."""
    opened.draw_nodes(request.param)
    return request.param
