// The page's functions that touch no page, called with known values: run by tests/page/check.py in the
// browser. Returns what is wrong, a line each.
async (folder) => {
  const wrong = [];
  const same = (what, found, wanted) => {
    const [a, b] = [found, wanted].map((value) => JSON.stringify(value));
    if (a !== b) wrong.push(`${what}: ${a} instead of ${b}`);
  };
  const load = (name) => import(`${folder}/${name}.js`);
  const { Meter, callersOf, countsOf, growth, heldOf, residentOf, scaleOf, smoothed } = await load("rates");
  const { bytes, counted, listed, number, seconds, share } = await load("format");
  const { EventParser } = await load("stream");
  const { niceTop, pathOf, placeLabels } = await load("lines");
  const { spansOf, sumsOf } = await load("waterfall");
  const { paceInWords, pieceOf } = await load("chat");
  const { State } = await load("state");
  const base64 = (values) => btoa(String.fromCharCode(...values));

  const held = [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
  same("bits, the lowest first", [...residentOf([base64([0b101, 1]), base64([0, 0])], 9)], held);
  same("ids", [...heldOf([[8, 0, 2], []], 9)], held);
  same("little-endian counts", [...countsOf(base64([1, 1, 0, 0, 255, 255, 255, 255]))], [257, 4294967295]);
  same("growth; a counter that fell began anew", [growth(4, 9), growth(10, 4), growth(undefined, 9)], [5, 4, 0]);
  const meter = new Meter();
  [0, 10, 20, 30, 5, 15, 25].forEach((steps, time) => meter.add(time, { steps }, new Uint32Array(1)));
  same("rates across a restart", [meter.perSecond("steps"), meter.perSecond("none")], [9, 0]);
  same("no rate yet", new Meter().perSecond("steps"), null);
  const { rate, caller } = callersOf([Float32Array.of(1, 0, 2), null, Float32Array.of(3, 0, 1)], 3);
  same("callers", [[...rate], [...caller]], [[4, 0, 3], [2, -1, 0]]);
  same("scale without calls", scaleOf(Float32Array.of(0, 0)), 0);
  same("the first rate", [...smoothed(new Float32Array(0), Uint32Array.of(0), Uint32Array.of(6), 2)], [3]);

  same("bytes", [2048, 0, null].map(bytes), ["2 KiB", "0 B", "–"]);
  same("seconds", [0.0123, 75, 0.25].map(seconds), ["12.3 ms", "1 min 15 s", "250 ms"]);
  same("shares", [0.256, 1].map(share), ["25.6 %", "100 %"]);
  same("words", [number(1234.5), listed(["a", "b", "c"]), counted(1, "expert")], ["1,235", "a, b and c", "1 expert"]);

  const parser = new EventParser();
  const chunks = [": hi\r\n\r\nevent: vie", "ws\nda", "ta: {\"a\":\"\u2028: b\"}\n", "\ndata: x\ndata: y\n\n"];
  same("events across chunks", chunks.flatMap((chunk) => [...parser.push(chunk)]),
    [{ name: "views", data: "{\"a\":\"\u2028: b\"}" }, { name: "message", data: "x\ny" }]);
  same("tops of axes", [niceTop(0), niceTop(0.03), niceTop(100), niceTop(3000, true)], [1, 0.05, 100, 5120]);
  const points = [[0, 1], [1, 2], [2, null], [3, 1], [20, 1]].map(([time, value]) => ({ time, value }));
  same("a line with gaps", pathOf(points, (x) => x, (y) => y), "M0.0 1.0L1.0 2.0M3.0 1.0M20.0 1.0");
  const labels = placeLabels([0, 2, 4, 100].map((x) => ({ x, text: "abc" })), 110);
  same("rows of labels", labels.map((each) => each.row), [0, 1, 0]);
  const call = { peer: "b", rows: 1, bytes: 2, begin: 0, arrived: 1, compute_begin: 3, compute_end: 6, end: 10 };
  same("parts of a call", spansOf(call).map((span) => span.end - span.begin), [1, 2, 3, 4]);
  same("sums of calls", sumsOf([call, { ...call, arrived: null }]).get("b"),
    { calls: 2, rows: 2, bytes: 4, wire: 5, queue: 2, compute: 3, unknown: 10 });
  same("a chunk", pieceOf({ choices: [{ delta: { reasoning_content: "x" } }], usage: { completion_tokens: 3 } }),
    { content: "", thoughts: "x", tokens: 3 });
  same("pace", paceInWords({ tokens: 11, asked: 0, first: 0.5, last: 1.5 }),
    "11 tokens, TTFT 500 ms, then 10 tokens/s");

  const state = new State();
  const server = (name, bits, target = null) => ({ name, slots: 4, resident: [base64([bits])],
    target: target === null ? null : [base64([target])] });
  const place = (change) => state.take("placement", { version: 1, epoch: 1, model: "m", you: "a", layers: 1,
    experts: 8, lost: [], servers: [server("a", 3), server("b", 12)], ...change });
  const lastMark = () => state.marks.at(-1)?.text;
  place({});
  same("holders", [[...state.holders], state.marks.length, state.plan], [[1, 1, 1, 1, 0, 0, 0, 0], 0, null]);
  const dry = { when: Date.now() / 1000, failure: "", migrate: true, dry_run: true, experts_moved: 1, reason: "it pays",
    servers: [{ name: "a", resident: [[0, 1, 2]] }, { name: "b", resident: [[3]] }] };
  state.takeDecision(dry);
  state.takeDecision({ ...dry });
  same("one dry run", [state.decisions.length, state.plan.dry], [1, true]);
  state.takeDecision({ ...dry, when: 5, servers: [] });
  state.takeDecision({ ...dry, when: 5, servers: [], failure: "torn" });
  same("a migration stops", [lastMark(), state.plan], ["The migration stopped: torn", null]);
  state.takeDecision({ ...dry, when: 6 });
  same("an old dry run", state.plan, null);
  state.takeDecision({ ...dry, when: Date.now() / 1000 });
  same("would move", [state.comes("a", 2), state.leaves("b", 2), state.leaves("a", 0), state.comingTo("a")],
    [true, true, false, 1]);
  place({ servers: [server("a", 3, 15), server("b", 12, 12)] });
  same("a migration begins", [lastMark(), state.plan.dry, state.comingTo("a")], ["2 experts begin to migrate", false, 2]);
  place({ servers: [server("a", 7, 15), server("b", 12, 12)] });
  same("it goes on", [state.comingTo("a"), state.newOn("a"), state.isNew("a", 2)], [1, 1, true]);
  place({ version: 2, servers: [server("a", 15), server("b", 12)] });
  same("it ends", [lastMark(), state.plan], ["Experts have migrated: placement 2", null]);
  place({ version: 3, lost: ["b"] });
  same("a loss", [lastMark(), state.isLost("b")], ["b is lost", true]);
  place({ version: 4 });
  same("a return", [lastMark(), state.newOn("b")], ["b serves", 0]);
  place({ version: 4, lost: ["c"], servers: [server("a", 3), server("b", 12), server("c", 0)] });
  same("a newcomer", lastMark(), "c joins");
  place({ version: 4, servers: [server("a", 3), server("b", 12), server("c", 0)] });
  same("it has started", lastMark(), "c serves");
  place({ version: 4 });
  same("it leaves", lastMark(), "c has left");

  const view = (time, change) => state.take("views", { time, launcher: true, servers: [{ name: "a", alive: true, fault: "",
    fault_time: 0, age: 0, running: 0, waiting: 0, in_flight: 0, prompt_tokens: 0, generation_tokens: time,
    ttft: null, itl: [0.01, 0.02], steps: time, layers: time, layers_waited: 0, rows: time, rows_away: 0,
    calls_local: 3 * time, calls_remote: time, memory: {}, spare_slots: 1, counts: base64(Array(32).fill(0)),
    links: [{ peer: "b", sent: 100 * time, received: 0, calls: 0, repeats: 0, lost: 0 }], ...change }] });
  view(100);
  view(101);
  view(102, { age: 1 });
  const { local, anyMiss, itl, bytes: carried } = state.history.get("a")[1];
  same("history", [state.history.get("a").length, local, anyMiss, itl, carried], [2, 0.75, 0, 0.01, 100]);
  view(120, { age: 19 });
  same("no rates of a silent server", state.meter("a"), null);
  view(121, { alive: false });
  view(130);
  same("after a loss, rates begin anew", state.meter("a").perSecond("steps"), null);
  return wrong;
}
