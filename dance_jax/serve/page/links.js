/** A table of the links, one row for each direction. */

import { byId, fillRows, setHidden } from "./dom.js";
import { bytesPerSecond, number, perSecond, seconds, share } from "./format.js";

export function drawLinks(state) {
  const links = [...state.views.values()].flatMap(({ name, links: its }) =>
    (its ?? []).map((link) => ({ from: name, ...link })));
  links.sort((a, b) => pairOf(a).localeCompare(pairOf(b)) || a.from.localeCompare(b.from));
  setHidden(byId("links-empty"), links.length > 0);
  setHidden(byId("links-box"), !links.length);
  fillRows(byId("links-rows"), links.map((link) => row(state, link)));
}

/** The two directions of a link have the same name, so that they are neighbours in the table. */
const pairOf = ({ from, peer }) => [from, peer].sort().join(" ");

function row(state, { from, peer, rate, round_trip: trip, repeats, lost }) {
  const meter = state.isLost(peer) ? null : state.meter(from);
  const carries = meter?.perSecond(`${peer}/sent`);
  const used = meter && rate ? carries / rate : null;
  return [
    { text: from, server: state.indexOf(from) },
    { text: peer, server: state.indexOf(peer) },
    meter ? bytesPerSecond(carries) : deadLink(state, from, peer),
    rate ? { text: `${share(used)} of ${bytesPerSecond(rate)}`, bar: used ?? 0 } : "not measured",
    seconds(trip),
    perSecond(meter?.perSecond(`${peer}/calls`)),
    { text: withRate(repeats, meter?.perSecond(`${peer}/repeats`)), grave: meter?.grown(`${peer}/repeats`) > 0 },
    { text: withRate(lost, meter?.perSecond(`${peer}/lost`)), grave: meter?.grown(`${peer}/lost`) > 0 },
  ];
}

function deadLink(state, from, peer) {
  const lost = [from, peer].find((name) => state.isLost(name));
  return lost ? `${lost} is lost` : `${from} does not answer`;
}

const withRate = (sum, rate) => (rate > 0 ? `${number(sum)}, now ${perSecond(rate)}` : number(sum));
