"use strict";
// A rotating view of C1' traces on a plain canvas: no library, no network. The page hands over `data` as JSON.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("view"), pen = canvas.getContext("2d");
  const $ = (id) => document.getElementById(id);
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#a8568a", "#b8860b"];
  const SMOOTH = 5; // segments a residue
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let target, shown, turn, zoom, spinning = !still, paths = [], points = [], scale = 1;

  const mix = (a, b, t) => a.map((v, k) => Math.round(v + (b[k] - v) * t));
  const ramp = (stops, t) => {
    const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), k = Math.min(Math.floor(x), stops.length - 2);
    return mix(stops[k], stops[k + 1], x - k);
  };
  // viridis-like from dark to light: even in lightness, so that it reads without colours too
  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const GOOD_TO_BAD = [[0, 114, 178], [120, 190, 220], [240, 228, 160], [230, 140, 50], [190, 40, 30]];
  const hex = (text) => [1, 3, 5].map((k) => parseInt(text.slice(k, k + 2), 16));

  const rotation = (axis, angle) => {
    const c = Math.cos(angle), s = Math.sin(angle);
    return axis === "x" ? [1, 0, 0, 0, c, -s, 0, s, c] : [c, 0, s, 0, 1, 0, -s, 0, c];
  };
  const times = (a, b) => Array.from({ length: 9 }, (_, n) => {
    const r = 3 * Math.floor(n / 3), c = n % 3;
    return a[r] * b[c] + a[r + 1] * b[c + 3] + a[r + 2] * b[c + 6];
  });
  const spun = (m, p) => [0, 3, 6].map((r) => m[r] * p[0] + m[r + 1] * p[1] + m[r + 2] * p[2]);

  // Catmull-Rom through the residues, cut where one is not resolved
  const smooth = (trace) => {
    const out = [];
    for (let i = 0; i + 1 < trace.length; i++) {
      const b = trace[i], c = trace[i + 1];
      if (!b || !c) continue;
      const a = trace[i - 1] || b, d = trace[i + 2] || c;
      for (let k = 0; k < SMOOTH; k++) {
        const at = (t) => b.map((v, x) => 0.5 * (2 * v + (c[x] - a[x]) * t +
          (2 * a[x] - 5 * v + 4 * c[x] - d[x]) * t * t + (3 * v - a[x] - 3 * c[x] + d[x]) * t * t * t));
        out.push([at(k / SMOOTH), at((k + 1) / SMOOTH), i + (k + 0.5) / SMOOTH]);
      }
    }
    return out;
  };

  const colour = (candidate, residue) => {
    const how = $("colour").value, number = Math.min(Math.round(residue), target.sequence.length - 1);
    if (how === "error" && candidate.error) {
      const far = candidate.error[number];
      return far === null ? [150, 150, 150] : ramp(GOOD_TO_BAD, far / 16);
    }
    if (how === "confidence") return ramp([...GOOD_TO_BAD].reverse(), candidate.confidence / 0.8);
    if (how === "position") return ramp(RAMP, residue / Math.max(target.sequence.length - 1, 1));
    return hex(COLOURS[candidate.number - 1] || "#555555");
  };

  const rebuild = () => {
    paths = [];
    if (target.reference && $("reference").checked)
      paths.push({ reference: true, segments: smooth(target.reference), trace: target.reference });
    for (const candidate of target.candidates)
      if (shown.has(candidate.number)) paths.push({ candidate, segments: smooth(candidate.xyz), trace: candidate.xyz });
    draw();
  };

  const draw = () => {
    const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    if (canvas.width !== Math.round(box.width * ratio)) canvas.width = Math.round(box.width * ratio);
    if (canvas.height !== Math.round(box.height * ratio)) canvas.height = Math.round(box.height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    scale = zoom * 0.46 * Math.min(box.width, box.height) / target.reach;
    const project = (p) => {
      const q = spun(turn, p), near = 1 / (1 - q[2] / (4 * target.reach));
      return [box.width / 2 + q[0] * scale * near, box.height / 2 - q[1] * scale * near, q[2], near];
    };
    const dark = matchMedia("(prefers-color-scheme: dark)").matches, paper = dark ? [27, 31, 35] : [255, 255, 255];
    const lines = [];
    points = [];
    for (const path of paths) {
      for (const [from, to, residue] of path.segments) {
        const a = project(from), b = project(to);
        const base = path.reference ? (dark ? [150, 156, 162] : [150, 150, 150]) : colour(path.candidate, residue);
        const fog = 0.5 * Math.min(Math.max(0.5 - a[2] / (2 * target.reach), 0), 1);
        lines.push([a[2] + b[2], a, b, mix(base, paper, fog), Math.max((path.reference ? 2.8 : 2.2) * scale * a[3], 1.2)]);
      }
      path.trace.forEach((p, i) => {
        if (p) points.push([...project(p).slice(0, 3), i, path]);
      });
    }
    lines.sort((a, b) => a[0] - b[0]);
    for (const [, a, b, rgb, width] of lines) {
      for (const [extra, shade, cap] of [[1.8, 0.55, "butt"], [0, 1, "round"]]) {
        pen.lineCap = cap; // round only inside: rims would show as rings
        pen.strokeStyle = `rgb(${rgb.map((v) => Math.round(v * shade)).join(",")})`;
        pen.lineWidth = width + extra;
        pen.beginPath(); pen.moveTo(a[0], a[1]); pen.lineTo(b[0], b[1]); pen.stroke();
      }
    }
    const left = 18, low = box.height - 18, bar = target.reach > 60 ? 50 : 10;
    pen.strokeStyle = pen.fillStyle = dark ? "#e8e6e1" : "#1d2125";
    pen.lineWidth = 2;
    pen.beginPath(); pen.moveTo(left, low); pen.lineTo(left + bar * scale, low); pen.stroke();
    pen.font = "12px sans-serif";
    pen.fillText(`${bar} Å`, left, low - 7);
    for (const path of paths) {
      if (path.reference) continue;
      const first = points.find((p) => p[4] === path && p[3] === 0);
      if (first) pen.fillText("5′", first[0] + 6, first[1] - 6);
    }
  };

  const choose = (index) => {
    target = data.targets[index];
    const best = target.candidates.reduce((a, b) => ((b.score ?? 0) > (a.score ?? 0) ? b : a));
    shown = new Set([best.number]);
    turn = [1, 0, 0, 0, 1, 0, 0, 0, 1];
    zoom = 1;
    $("reference").disabled = !target.reference;
    $("reference").checked = Boolean(target.reference);
    $("error").disabled = !target.reference;
    if (!target.reference && $("colour").value === "error") $("colour").value = "candidate";
    $("candidates").replaceChildren(...target.candidates.map((candidate) => {
      const label = document.createElement("label"), box = document.createElement("input");
      const swatch = document.createElement("i");
      swatch.style.background = COLOURS[candidate.number - 1];
      box.type = "checkbox";
      box.checked = shown.has(candidate.number);
      box.addEventListener("change", () => {
        shown[box.checked ? "add" : "delete"](candidate.number);
        rebuild();
      });
      const score = candidate.score === null ? "" : `, TM-score ${candidate.score.toFixed(3)}`;
      label.append(box, swatch, `Candidate ${candidate.number}: expected ${candidate.confidence.toFixed(3)}${score}`);
      return label;
    }));
    $("facts").textContent = `${target.sequence.length} nt` +
      (target.reference ? "; candidates lie on the known structure (grey)" : "; no known structure: they lie on candidate 1");
    legend();
    rebuild();
  };

  const legend = () => {
    const how = $("colour").value, gradient = (stops) => `linear-gradient(90deg, ${stops.map((s) => `rgb(${s})`).join(",")})`;
    const told = { error: [GOOD_TO_BAD, "0 Å", "16 Å or more from the known structure"],
      confidence: [[...GOOD_TO_BAD].reverse(), "0", "0.8 expected TM-score"], position: [RAMP, "5′", "3′"] }[how];
    $("legend").hidden = !told;
    if (!told) return;
    $("bar").style.background = gradient(told[0]);
    $("low").textContent = told[1];
    $("high").textContent = told[2];
  };

  data.targets.forEach((each, index) => $("target").append(new Option(each.name, index)));
  $("target").addEventListener("change", () => choose(Number($("target").value)));
  $("colour").addEventListener("change", () => { legend(); draw(); });
  $("reference").addEventListener("change", rebuild);
  $("spin").checked = spinning;
  $("spin").addEventListener("change", () => { spinning = $("spin").checked; });
  const move = (dx, dy) => {
    turn = times(rotation("x", dy * 0.008), times(rotation("y", dx * 0.008), turn));
    draw();
  };
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    held = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
    spinning = $("spin").checked = false;
  });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (held) {
      move(event.clientX - held[0], event.clientY - held[1]);
      held = [event.clientX, event.clientY];
      return;
    }
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const near = points.filter((p) => Math.hypot(p[0] - x, p[1] - y) < 9).sort((a, b) => b[2] - a[2])[0];
    if (!near) { $("hover").textContent = "\u00a0"; return; }
    const [, , , i, path] = near, far = path.candidate?.error?.[i];
    $("hover").textContent = `${target.sequence[i]}${i + 1}, ${path.reference ? "known structure" : `candidate ${path.candidate.number}`}` +
      (typeof far === "number" ? `, ${far.toFixed(1)} Å off` : "");
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom = Math.min(Math.max(zoom * Math.exp(-event.deltaY * 0.001), 0.3), 12);
    draw();
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-20, 0], ArrowRight: [20, 0], ArrowUp: [0, -20], ArrowDown: [0, 20] }[event.key];
    if (step) { event.preventDefault(); move(...step); }
    if (event.key === "+" || event.key === "-") { zoom *= event.key === "+" ? 1.15 : 1 / 1.15; draw(); }
  });
  addEventListener("resize", draw);
  const tick = () => {
    if (spinning) move(1.1, 0);
    requestAnimationFrame(tick);
  };
  choose(0);
  tick();
})();
