"use strict"
const study = JSON.parse(document.getElementById("study").textContent), box = "srnb-ranking-" + study.study
const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", count = study.images.length
const at = id => document.getElementById(id)
const fresh = () => ({participant: "", at: 0, answers: {}})
let state = fresh(), shown = 0 // shown: which picture is at full size
try { state = JSON.parse(localStorage.getItem(box)) || state } catch {}
function keep() { try { localStorage.setItem(box, JSON.stringify(state)) } catch { at("warning").hidden = false } }
const order = () => state.answers[state.at + 1] || [] // letters, best first
const full = () => order().length === study.places

function make(tag, attributes, ...children) {
  const e = document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v)
  e.append(...children)
  return e
}
function candidate(uri, i) { // a picture that can be given a place
  const letter = letters[i], name = "Picture " + letter
  const pick = make("button", {class: "pick"}, make("img", {src: uri, alt: name}), make("span", {class: "badge"}))
  const enlarge = make("button", {class: "enlarge", "aria-label": name + " at full size"}, letter + " \u2922")
  pick.onclick = () => toggle(letter)
  enlarge.onclick = () => look(i)
  return make("figure", {"data-letter": letter}, pick, enlarge)
}
function build() { // the screen of one image
  const image = study.images[state.at], cells = image.pictures.map(candidate)
  if (image.reference) cells.unshift(make("figure", {"data-reference": ""},
    make("div", {class: "given"}, make("img", {src: image.reference, alt: "Input"})),
    make("figcaption", {class: "enlarge"}, "input")))
  at("pictures").replaceChildren(...cells)
  at("progress").textContent = "Image " + (state.at + 1) + " of " + count
  at("bar").max = count
  arrange(); ranks()
  at("pictures").querySelector(".pick").focus({preventScroll: true})
}
function arrange() { // as many columns as make the pictures largest
  const grid = at("pictures"), n = grid.childElementCount, picture = grid.querySelector(".pick img")
  if (!n) return
  const size = c => Math.min(grid.clientWidth / c / picture.naturalWidth,
    (grid.clientHeight / Math.ceil(n / c) - 24) / picture.naturalHeight)
  const best = Array.from({length: n}, (_, i) => i + 1).reduce((a, b) => size(b) > size(a) ? b : a)
  grid.style.grid = "repeat(" + Math.ceil(n / best) + ", minmax(0, 1fr)) / repeat(" + best + ", minmax(0, 1fr))"
  if (!picture.complete) picture.onload = arrange
}
function ranks() { // what changes at a click
  for (const figure of document.querySelectorAll("figure[data-letter]")) {
    const letter = figure.dataset.letter, place = order().indexOf(letter) + 1, pick = figure.querySelector(".pick")
    figure.querySelector(".badge").textContent = place || ""
    pick.setAttribute("aria-pressed", place > 0)
    pick.setAttribute("aria-label", "Picture " + letter + (place ? ", place " + place : ", no place"))
  }
  at("said").textContent = order().length + " of " + study.places + " places given"
  at("bar").value = state.at + full()
  at("back").disabled = !state.at
  at("undo").disabled = !order().length
  at("next").disabled = !full()
  at("next").textContent = state.at + 1 < count ? "Next" : "Finish"
}
function place(list) { state.answers[state.at + 1] = list; keep(); ranks() }
function toggle(letter) {
  if (order().includes(letter)) place(order().filter(o => o !== letter))
  else if (!full()) place([...order(), letter])
}
function go(to) { state.at = Math.max(0, Math.min(count, to)); keep(); show() }
function look(i) {
  const pictures = study.images[state.at].pictures
  shown = (i + pictures.length) % pictures.length
  at("full").querySelector("img").src = pictures[shown]
  at("full").querySelector("p").textContent = letters[shown] + ": left and right arrows for the others, Esc to close"
  if (!at("full").open) at("full").showModal()
}
function hand() { // the answers, in the form that read_answers reads
  const text = JSON.stringify({study: study.study, participant: state.participant, answers: state.answers}, null, 1)
  at("answers").value = text
  at("download").href = URL.createObjectURL(new Blob([text], {type: "application/json"}))
  at("download").download = "answers-" + state.participant.replace(/[^\w-]+/g, "_") + ".json"
}
function show() {
  const page = !state.participant ? "start" : state.at < count ? "rank" : "end"
  for (const id of ["start", "rank", "end"]) at(id).hidden = id !== page
  if (page === "rank") build()
  if (page === "end") hand()
}
for (const o of document.querySelectorAll(".question")) o.textContent = study.question
at("places").textContent = study.places
at("start").onsubmit = e => {
  e.preventDefault()
  state.participant = at("participant").value.trim()
  keep(); show()
}
at("undo").onclick = () => place(order().slice(0, -1))
at("back").onclick = () => go(state.at - 1)
at("next").onclick = () => { if (full()) { go(state.at + 1); if (state.at === count) at("download").click() } }
at("revise").onclick = () => go(count - 1)
at("restart").onclick = () => {
  if (!confirm("Are the answers saved? They will be deleted here.")) return
  state = fresh()
  at("participant").value = ""
  keep(); show()
}
at("full").onclick = () => at("full").close()
addEventListener("resize", arrange)
addEventListener("keydown", e => {
  if (at("rank").hidden || e.ctrlKey || e.metaKey || e.altKey) return
  const step = {ArrowRight: 1, ArrowLeft: -1}[e.key], i = e.key.length === 1 ? letters.indexOf(e.key.toUpperCase()) : -1
  if (at("full").open) { if (step) look(shown + step) }
  else if (step > 0) at("next").click()
  else if (step < 0) at("back").click()
  else if (e.key === "Backspace") at("undo").click()
  else if (i >= 0 && i < study.images[state.at].pictures.length) toggle(letters[i])
})
show()
