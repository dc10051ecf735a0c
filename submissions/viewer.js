// What the page asks of 3Dmol.js, inlined before this: one target at a time, as bonded C1' atoms.
(() => {
  "use strict";
  const $ = (id) => document.getElementById(id);
  const { targets } = JSON.parse($("data").textContent);
  const GOOD_TO_BAD = ["#0072b2", "#78bedc", "#f0e4a0", "#e68c32", "#be281e"];
  const VIRIDIS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"]; // even in lightness: reads in grey too
  const scale = (end, stops, low, high) => {
    // the library gives the last colour a step of its own: here it begins at the end
    const last = (end * stops.length) / (stops.length - 1);
    return { stops, low, high, at: new $3Dmol.Gradient.CustomLinear(0, last, stops) };
  };
  const SCALES = {
    error: scale(16, GOOD_TO_BAD, "0 Å", "16 Å or more off the known structure; colourless where that is not resolved"),
    confidence: scale(0.8, [...GOOD_TO_BAD].reverse(), "0", "0.8 expected TM-score"),
    position: scale(1, VIRIDIS, "5′", "3′"),
  };
  const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let target, shown, viewer;

  const error = (candidate, i) => {
    const known = target.reference?.[i];
    return known ? Math.hypot(...known.map((at, axis) => at - candidate.xyz[i][axis])) : null;
  };
  const VALUES = {
    error, confidence: (candidate) => candidate.confidence, position: (_, i) => i / target.sequence.length,
  };
  const colour = (candidate, i) => {
    const how = $("colour").value, value = VALUES[how]?.(candidate, i);
    if (value === null) return themed("--blank");
    return value === undefined ? themed(`--s${candidate.number - 1}`) : SCALES[how].at.valueToHex(value);
  };

  const chain = (i) => target.chains.findLast(([, first]) => first <= i);
  const residue = (i) => {
    const [name, first] = chain(i);
    return `${target.chains.length > 1 ? `${name} ` : ""}${target.sequence[i]}${i - first + 1}`;
  };

  const add = (xyz, radius, colours, told) => {
    const atoms = [], pieces = xyz.length > 1000 ? 2 : 4; // of the curve, a residue: 4,640 nt are drawn 3 times as fast
    const heads = []; // of chains, of which the first atom is drawn as a ball
    for (let end = 0, start = 0; end <= xyz.length; end++) {
      // a piece ends with its chain, and where a residue is not resolved: a gap stays a gap
      if (xyz[end] && target.chains.every(([, first]) => first !== end)) continue;
      const run = xyz.slice(start, end).map((p, k) => Object.assign(new $3Dmol.Vector3(...p), { atom: start + k }));
      const curve = run.length > 1 ? $3Dmol.subdivide_spline(run, pieces) : run;
      curve.forEach(({ x, y, z, atom }, k) => {
        if (!atoms.length || chain(atom) !== chain(atoms.at(-1).resi)) heads.push(atoms.length);
        const index = atoms.length, bonds = [...(k ? [index - 1] : []), ...(k + 1 < curve.length ? [index + 1] : [])];
        atoms.push({ x, y, z, bonds, elem: "C", resi: atom, color: colours[atom] });
      });
      start = xyz[end] ? end : end + 1;
    }
    const model = viewer.addModel();
    model.addAtoms(atoms);
    const name = ({ resi }) => { $("hover").textContent = `${residue(resi)}, ${told(resi)}`; };
    model.setHoverable({}, true, name, () => { $("hover").textContent = ""; });
    model.setStyle({ stick: { radius, showNonBonded: true } }); // a residue between two gaps has no bond
    model.setStyle({ index: heads }, { sphere: { radius: 2 * radius } }, true); // 5′ ends
  };

  const draw = (fresh) => {
    if (!viewer) return;
    const view = viewer.getView(), radius = 0.9 + target.sequence.length / 2000;
    viewer.removeAllModels();
    viewer.setBackgroundColor(themed("--card"));
    viewer.setViewStyle({ style: "outline", color: "black", width: 0.1 });
    if ($("reference").checked)
      add(target.reference, 0.6 * radius, target.reference.map(() => themed("--faint")), () => "known structure");
    for (const candidate of target.candidates.filter((each) => shown.has(each.number)))
      add(candidate.xyz, radius, candidate.xyz.map((_, i) => colour(candidate, i)), (i) => {
        const far = error(candidate, i);
        return `candidate ${candidate.number}${far === null ? "" : `, ${far.toFixed(1)} Å off`}`;
      });
    if (fresh) viewer.setView([0, 0, 0, 0, 0, 0, 0, 1]); // not turned
    viewer.zoomTo(); // also says how near and how far is seen
    if (!fresh) viewer.setView(view);
    viewer.render();
  };

  const legend = () => {
    const told = SCALES[$("colour").value];
    $("legend").hidden = !told;
    if (!told) return;
    $("bar").style.background = `linear-gradient(90deg, ${told.stops})`;
    $("low").textContent = told.low;
    $("high").textContent = told.high;
  };

  const choose = () => {
    target = targets[$("target").value];
    $("hover").textContent = "";
    const best = target.candidates.reduce((a, b) => ((b.score ?? 0) > (a.score ?? 0) ? b : a));
    shown = new Set([best.number]);
    $("reference").disabled = $("error").disabled = !target.reference;
    $("reference").checked = Boolean(target.reference);
    if (!target.reference && $("colour").value === "error") $("colour").value = "candidate";
    $("candidates").replaceChildren(...target.candidates.map((candidate) => {
      const [label, box, swatch] = ["label", "input", "i"].map((tag) => document.createElement(tag));
      swatch.style.background = `var(--s${candidate.number - 1})`;
      box.type = "checkbox";
      box.checked = shown.has(candidate.number);
      box.addEventListener("change", () => { shown[box.checked ? "add" : "delete"](candidate.number); draw(); });
      const score = candidate.score === null ? "" : `, got ${candidate.score.toFixed(3)}`;
      const expected = `expected TM‑score ${candidate.confidence.toFixed(3)}`;
      label.append(box, swatch, `Candidate ${candidate.number}: ${expected}${score}`);
      return label;
    }));
    const chains = target.chains.length > 1 ? ` in ${target.chains.length} chains` : "";
    $("facts").textContent = `${target.sequence.length} nt${chains}; ${target.facts}`;
    legend();
    draw(true);
  };

  const turn = () => viewer.spin($("spin").checked && "vy", 0.6, true);
  const KEYS = {
    ArrowLeft: () => viewer.rotate(-10, "vy"), ArrowRight: () => viewer.rotate(10, "vy"),
    ArrowUp: () => viewer.rotate(-10, "vx"), ArrowDown: () => viewer.rotate(10, "vx"),
    "+": () => viewer.zoom(1.15), "-": () => viewer.zoom(1 / 1.15),
  };
  try {
    viewer = $3Dmol.createViewer($("view"), { hoverDuration: 60 });
  } catch (reason) {
    console.warn(reason); // no WebGL: the page says so, and still has the scores
  }
  if (viewer) {
    $("missing").remove();
    viewer.setViewChangeCallback(() => { // 10 or 50 Å where the middle of the structure is
      const apart = viewer.screenOffsetToModel(100, 0).length(), long = apart > 60 ? 50 : 10;
      $("ruler").style.width = `${(100 * long) / apart}px`;
      $("ruler").textContent = `${long} Å`;
    });
    $("view").addEventListener("keydown", (event) => {
      if (!KEYS[event.key]) return;
      event.preventDefault();
      KEYS[event.key]();
    });
    $("view").addEventListener("pointerdown", () => { $("spin").checked = false; turn(); });
    $("spin").addEventListener("change", turn);
  }
  targets.forEach((each, index) => $("target").append(new Option(each.name, index)));
  $("target").addEventListener("change", choose);
  $("colour").addEventListener("change", () => { legend(); draw(); });
  $("reference").addEventListener("change", () => draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  choose();
})();
