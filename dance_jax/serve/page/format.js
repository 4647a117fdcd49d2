/** Numbers as people read them. Every function takes null or undefined for "not known". */

export const UNKNOWN = "–";

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 1234.5 -> "1,235", 12.34 -> "12.3". */
export function number(value) {
  if (!known(value)) return UNKNOWN;
  return (Math.abs(value) >= 100 ? whole : plain).format(value);
}

/** A count with its noun: (1, "expert") -> "1 expert", (2, "expert") -> "2 experts". */
export function counted(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** Bytes: 2048 -> "2 KiB". */
export function bytes(value) {
  if (!known(value)) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (Math.abs(size) >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${number(unit ? size : Math.round(size))} ${units[unit]}`;
}

export const bytesPerSecond = (value) => (known(value) ? `${bytes(value)}/s` : UNKNOWN);
export const perSecond = (value) => (known(value) ? `${number(value)}/s` : UNKNOWN);

/** A duration in seconds: 0.0123 -> "12.3 ms", 75 -> "1 min 15 s". */
export function seconds(value) {
  if (!known(value)) return UNKNOWN;
  if (value < 0.1) return `${plain.format(value * 1000)} ms`;
  if (value < 1) return `${whole.format(value * 1000)} ms`;
  if (value < 60) return `${plain.format(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

/** A fraction: 0.256 -> "25.6 %". */
export function share(value) {
  if (!known(value)) return UNKNOWN;
  const percent = value * 100;
  return `${percent >= 99.95 ? whole.format(percent) : plain.format(Math.round(percent * 10) / 10)} %`;
}

/** A Unix time in seconds as the time of day here; with the date if that was not today. */
export function clock(time) {
  if (!known(time) || time <= 0) return UNKNOWN;
  const date = new Date(time * 1000);
  const day = date.toDateString() === new Date().toDateString() ? "" : `${date.toLocaleDateString()} `;
  return day + date.toLocaleTimeString("en-GB");
}

/** "a", "a and b", "a, b and c". */
export function listed(names) {
  if (names.length < 2) return names[0] ?? "";
  return `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}
