// Live updates and the map's cells; every page works without it.
(function () {
  "use strict";
  var body = document.body, state = document.getElementById("live-state");
  if (body.dataset.events && window.EventSource) {
    var source = new EventSource(body.dataset.events), waiting = false;
    var refresh = function () {
      if (document.hidden) { waiting = true; return; }
      waiting = false;
      var url = body.dataset.live + (location.search && body.dataset.live.indexOf("?") < 0 ? location.search : "");
      window.htmx.ajax("GET", url, { target: "#live", select: "#live", swap: "outerHTML" });
    };
    source.onopen = function () { state.hidden = false; };
    source.onerror = function () { state.hidden = true; };
    source.addEventListener("turn", refresh);
    document.addEventListener("visibilitychange", function () { if (waiting && !document.hidden) refresh(); });
    window.addEventListener("pagehide", function () { source.close(); });
  }
  var newest = function () {
    document.querySelectorAll(".scroll.map").forEach(function (map) { map.scrollLeft = map.scrollWidth; });
  };
  newest();
  document.addEventListener("htmx:afterSettle", newest);
  document.addEventListener("click", function (event) {
    var cell = event.target.closest && event.target.closest("[data-page]");
    if (cell) { var map = cell.closest("svg"); location.href = map.dataset.pages + cell.dataset.page + map.dataset.tail; }
  });
})();
