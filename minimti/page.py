"""The page of a comparison, as templates for str.format.

PAGE takes mark, sections, seconds and fps; FIGURE, of which sections are made, kind, video (base64) and label.
"""

MARK = '<meta name="generator" content="minimti">'

FIGURE = """<figure class="{kind}">
<video muted playsinline preload="auto" src="data:video/mp4;base64,{video}"></video>
<figcaption>{label}</figcaption>
</figure>"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{mark}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>minimti: results beside their clips</title>
<link rel="icon" href="data:,">
<style>
body {{ margin: 0; font: 15px/1.4 system-ui, sans-serif; color: #222; background: #fff; }}
header {{ position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center;
  padding: 8px 16px; background: #f4f4f4; border-bottom: 1px solid #ccc; z-index: 1; }}
header input[type=range] {{ flex: 1; min-width: 120px; }}
section {{ display: flex; flex-wrap: wrap; gap: 12px; padding: 16px; align-items: end; }}
section + section {{ border-top: 1px solid #ddd; }}
figure {{ margin: 0; max-width: 100%; }}
.clip figcaption {{ font-weight: 600; }}
video {{ display: block; max-width: 100%; background: #eee; }}
figcaption {{ padding-top: 4px; text-align: center; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<header>
<button id="play">Pause</button>
<button id="back">&lsaquo; frame</button>
<button id="on">frame &rsaquo;</button>
<label>Speed <select id="speed"><option value="0.25">&frac14;</option><option value="0.5">&frac12;</option>
<option value="1" selected>1</option></select></label>
<input id="time" type="range" min="0" max="{seconds}" step="any" value="0" aria-label="Time">
<output id="shown"></output>
</header>
<main>
{sections}
</main>
<script>
"use strict";
// One clock for all videos: they play by themselves, and one that strays from the clock is put right.
const SECONDS = {seconds}, FPS = {fps}, STRAY = 0.5 / FPS;
const videos = [...document.querySelectorAll("video")];
const element = (id) => document.getElementById(id);
let time = 0, speed = 1, playing = true, last = performance.now();

const placeOf = (video) => Math.min(time, Math.max(0, video.duration - 0.5 / FPS));
function show(exactly) {{
  for (const video of videos) {{
    if (!(video.duration > 0)) continue;
    const place = placeOf(video), ended = time >= video.duration;
    const stray = Math.abs(video.currentTime - place);
    if (stray > (exactly || ended ? 0.001 : STRAY) && !video.seeking) video.currentTime = place;
    video.playbackRate = speed;
    if (!playing || ended) video.pause();
    else if (video.paused) video.play().catch(() => {{}});
  }}
  element("time").value = time;
  element("shown").value = time.toFixed(2) + " s of " + SECONDS.toFixed(2);
  element("play").textContent = playing ? "Pause" : "Play";
}}
function tick(now) {{
  if (playing) time += speed * Math.min(now - last, 250) / 1000;
  last = now;
  const again = time >= SECONDS;
  if (again) time = 0;
  show(again || !playing);
  requestAnimationFrame(tick);
}}
function step(frames) {{
  playing = false;
  const count = Math.round(SECONDS * FPS);
  time = ((Math.floor(time * FPS + 1e-6) + frames + count) % count + 0.5) / FPS;
}}
element("play").onclick = () => {{ playing = !playing; }};
element("back").onclick = () => step(-1);
element("on").onclick = () => step(1);
element("speed").onchange = (event) => {{ speed = Number(event.target.value); }};
element("time").oninput = (event) => {{ playing = false; time = Number(event.target.value); }};
const ready = () => videos.every((video) => video.readyState >= 2 || video.error);
function begin() {{
  if (!ready()) return setTimeout(begin, 50);
  last = performance.now();
  requestAnimationFrame(tick);
}}
begin();
</script>
</body>
</html>
"""
