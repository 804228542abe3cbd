// Escape stops the work of the open tab; Docs opens the Help tab; the theme switch lasts as long as the page.
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape') return;
  for (const button of document.querySelectorAll('.mt-stop')) if (button.offsetParent) button.click();
});
document.addEventListener('click', (event) => {
  const id = event.target.closest('button') && event.target.closest('button').id;
  if (id === 'mt-theme') document.body.classList.toggle('dark');
  if (id === 'mt-docs') for (const tab of document.querySelectorAll('#tabs [role=tab]'))
    if (tab.textContent.trim() === 'Help') tab.click();
});
